"""One JupyterLab and one Chromium for all tests here; every page is photographed and its console listened to."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser_lab import CHROMIUM_ARGS, SCREENSHOTS, Lab, Notebook, chromium, opened_page
from playwright.sync_api import Browser, Page, sync_playwright


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    executable = chromium()
    if executable is None:
        pytest.skip("no Chromium: apt-get install chromium, or name one by the environment variable KDLAB_CHROMIUM")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_ARGS)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Lab]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    running = Lab.start(tmp_path_factory.mktemp("lab"))
    yield running
    running.stop()


@pytest.fixture
def photograph_of() -> Callable[[Page, str], Path]:
    """Keeps a picture of what a page shows now, under a name."""

    def keep(page: Page, name: str) -> Path:
        SCREENSHOTS.mkdir(exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        page.screenshot(path=path)
        return path

    return keep


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page for one test; it fails on any JavaScript error that the page met."""
    with opened_page(browser, re.sub(r"[^0-9a-z]+", "-", request.node.name.removeprefix("test_"))) as opened:
        yield opened


@pytest.fixture
def notebook(page: Page, lab: Lab) -> Iterator[Callable[[str], Notebook]]:
    """Opens notebooks of the copied folder by name."""
    opened: list[Notebook] = []

    def open_(name: str) -> Notebook:
        opened.append(Notebook(page, lab, name))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()
