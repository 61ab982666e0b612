"""`make lab` as somebody meets it for the first time, and the quickstart in it."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from browser_lab import DIALOG, Lab, Notebook
from playwright.sync_api import Page, expect


def test_lab_opens_on_the_notebooks_without_a_dialog(page: Page, lab: Lab) -> None:
    page.goto(f"{lab.url}?token={lab.token}")
    expect(page.get_by_role("listitem", name="00_quickstart.ipynb")).to_be_visible(timeout=60_000)
    page.wait_for_timeout(4000)  # the prompts of a first start come late
    expect(page.locator(DIALOG)).to_have_count(0)
    assert "/lab/tree/notebooks" in page.url


def test_lab_keeps_its_token(lab: Lab) -> None:
    assert len(lab.token) >= 32
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{lab.url}api/contents", timeout=10)


@pytest.mark.timeout(400)
def test_the_quickstart_runs_and_shows_its_figures(
    notebook: Callable[[str], Notebook], photograph_of: Callable[[Page, str], Path]
) -> None:
    quickstart = notebook("00_quickstart.ipynb")
    quickstart.rendered()
    quickstart.run_all(300)
    quickstart.rendered()
    pictures = quickstart.panel.locator(".jp-OutputArea-output img")
    expect(pictures.nth(7)).to_be_visible()
    sizes = pictures.evaluate_all("all => all.map(i => [i.complete, i.naturalWidth, i.naturalHeight])")
    assert all(complete and width > 300 and height > 150 for complete, width, height in sizes), sizes
    expect(quickstart.panel.locator(".jp-OutputArea-output table").first).to_contain_text("camera + unidistill")
    assert quickstart.ask("sorted(metrics)") == ["student + UniDistill", "student alone", "teacher"]
    pictures.first.scroll_into_view_if_needed()
    photograph_of(quickstart.page, "quickstart-cameras")
