"""JupyterLab as `make lab` starts it, and a notebook in it as a person sees it in Chromium.

What the page shows is asked of the page; what the kernel holds is asked of the kernel, over a connection of its own.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_client.blocking import BlockingKernelClient
from playwright.sync_api import Browser, ConsoleMessage, FloatRect, Locator, Page, expect

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = Path(__file__).parent / "screenshots"
CHROMIUM_ARGS = ["--use-gl=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]
BROKEN = re.compile(
    r"Error displaying widget|Error creating widget|Loading widget|Javascript Error|model not found", re.I
)
DIALOG = ".jp-Dialog, .jp-toast-button, .Toastify__toast"


def chromium() -> str | None:
    """The browser's executable: KDLAB_CHROMIUM, or what PATH holds."""
    named = os.environ.get("KDLAB_CHROMIUM")
    return named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Lab:
    """A running JupyterLab of `make lab` on a copy of the notebooks, with settings of nobody."""

    folder: Path
    process: subprocess.Popen[bytes]
    url: str = ""
    token: str = ""

    @classmethod
    def start(cls, folder: Path, seconds: float = 90) -> Lab:
        """Start it and wait until it answers."""
        shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        arguments = f"--no-browser --ServerApp.port={free_port()}"
        make = ["make", "-s", "-o", ".venv/.kdlab-setup", "lab", f"BIN={Path(sys.executable).parent}", f"ROOT={folder}"]
        with (folder / "lab.log").open("wb") as log:
            process = subprocess.Popen(
                [*make, f"ARGS={arguments}"],
                cwd=ROOT,
                env=cls.environment(folder),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        lab = cls(folder, process)
        end = time.monotonic() + seconds
        while not lab._answers():
            if process.poll() is not None or time.monotonic() > end:
                lab.stop()
                raise RuntimeError(f"JupyterLab did not start:\n{(folder / 'lab.log').read_text()}")
            time.sleep(0.2)
        return lab

    @staticmethod
    def environment(folder: Path) -> dict[str, str]:
        """That of a person who opens Lab for the first time, and of fast notebooks."""
        settings = folder / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
        settings.parent.mkdir(parents=True)
        settings.write_text('{"windowingMode": "none"}')  # else only the cells in sight are in the page
        own = {
            "JUPYTERLAB_SETTINGS_DIR": folder / "settings",
            "JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces",
            "JUPYTER_CONFIG_DIR": folder / "config",
            "JUPYTER_DATA_DIR": folder / "data",
            "JUPYTER_RUNTIME_DIR": folder / "runtime",
            "IPYTHONDIR": folder / "ipython",
            "KDLAB_OUT": os.environ.get("KDLAB_OUT") or folder / "runs",
            "KDLAB_FAST": "1",
        }
        return {**os.environ, **{name: str(value) for name, value in own.items()}}

    def _answers(self) -> bool:
        for record in (self.folder / "runtime").glob("jpserver-*.json"):
            try:
                known = json.loads(record.read_text())
                self.url, self.token = known["url"], known["token"]
                return bool(self.get("api/status"))
            except (OSError, ValueError):
                continue
        return False

    def get(self, path: str) -> Any:
        """The server's answer in JSON."""
        return json.loads(self._ask("GET", path))

    def _ask(self, how: str, path: str) -> bytes:
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(self.url + path, headers=headers, method=how)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    def sessions_of(self, notebook: str) -> list[Any]:
        """What runs for a notebook of the folder."""
        return [s for s in self.get("api/sessions") if s["path"] == f"notebooks/{notebook}"]

    def end_kernel_of(self, notebook: str) -> None:
        """End a notebook's kernel by the server, which would start one anew that ended by itself."""
        for session in self.sessions_of(notebook):
            self._ask("DELETE", f"api/sessions/{session['id']}")

    def kernel_of(self, notebook: str, seconds: float = 60) -> BlockingKernelClient:
        """A connection to the kernel that runs a notebook of the folder, as soon as it has started."""
        end = time.monotonic() + seconds
        while not (found := self.sessions_of(notebook)):
            assert time.monotonic() < end, f"{notebook} has no kernel after {seconds} s"
            time.sleep(0.2)
        connection = self.folder / "runtime" / f"kernel-{found[0]['kernel']['id']}.json"
        client = BlockingKernelClient(connection_file=str(connection))
        client.load_connection_file()
        client.start_channels(hb=False)  # a busy machine is no dead kernel
        return client

    def stop(self) -> None:
        """End it, its kernels first."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(20)


#: dash, which open3d imports, opens a comm for a JupyterLab extension that is in no installation of ours.
DASH = "Exception opening new comm"


@dataclass
class Complaints:
    """JavaScript errors of a page, without the one that is known and not kdlab's."""

    messages: list[str] = field(default_factory=list)
    excused: int = 0

    def listen(self, page: Page) -> None:
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.messages.append(f"uncaught: {error}"))

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and message.text == DASH and not self.excused:
            self.excused += 1
        elif message.type == "error":
            self.messages.append(f"{message.text} ({message.location.get('url', '')})")


@contextmanager
def opened_page(browser: Browser, name: str) -> Iterator[Page]:
    """A page that is photographed at its end, and fails then on any JavaScript error that it met."""
    context = browser.new_context(viewport={"width": 1500, "height": 1000})
    page = context.new_page()
    complaints = Complaints()
    complaints.listen(page)
    try:
        yield page
    finally:
        if not page.is_closed():
            SCREENSHOTS.mkdir(exist_ok=True)
            page.screenshot(path=SCREENSHOTS / f"{name}.png")
        context.close()
    assert not complaints.messages, "\n".join(complaints.messages)


class Notebook:
    """One notebook, open in the browser."""

    def __init__(self, page: Page, lab: Lab, name: str) -> None:
        self.page, self.lab, self.name = page, lab, name
        workspace = Path(name).stem  # of its own: Lab opens again what was open in the same workspace before
        page.goto(f"{lab.url}lab/workspaces/{workspace}/tree/notebooks/{name}?token={lab.token}")
        page.locator(".jp-NotebookPanel:visible .jp-Cell").first.wait_for(timeout=60_000)
        self.panel = page.locator(".jp-NotebookPanel:visible")
        self.client = lab.kernel_of(name)
        self.client.wait_for_ready(timeout=60)

    def run_all(self, seconds: float = 180) -> None:
        """Clear what is stored, run all cells, and wait for the last; a cell's error ends it at once."""
        self.menu("Edit", "Clear Outputs of All Cells")
        self.menu("Run", "Run All Cells")
        self.wait(seconds)

    def menu(self, name: str, entry: str) -> None:
        """Pick an entry of the menu bar."""
        self.page.get_by_role("menuitem", name=name, exact=True).click()
        self.page.locator(".lm-Menu:visible").get_by_text(entry, exact=True).click()

    def wait(self, seconds: float = 60) -> None:
        """Until every code cell with content has a number."""
        end = time.monotonic() + seconds
        while True:
            self.no_error()
            prompts = self.panel.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
            if prompts and all(re.fullmatch(r"\[\d+\]:", text.strip()) for text in prompts):
                return
            assert time.monotonic() < end, f"{self.name}: still running after {seconds} s, prompts {prompts}"
            self.page.wait_for_timeout(250)

    def no_error(self) -> None:
        """No cell shows an exception."""
        errors = self.panel.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]')
        assert not errors.count(), f"{self.name}: {errors.first.inner_text()}"

    def rendered(self) -> None:
        """Every widget of the notebook is drawn, and no dialog covers the page."""
        self.no_error()
        views = self.panel.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.widget-view+json"]')
        for k in range(views.count()):
            views.nth(k).scroll_into_view_if_needed()
            box = views.nth(k).bounding_box()
            assert box and box["width"] > 50 and box["height"] > 10, f"{self.name}: widget {k} has no size: {box}"
        shown = self.panel.inner_text()
        found = BROKEN.search(shown)
        assert not found, f"{self.name}: {shown[max(0, found.start() - 200) : found.end() + 400]}"
        assert not self.page.locator(DIALOG).count(), self.page.locator(DIALOG).first.inner_text()

    def ask(self, expression: str) -> Any:
        """The value of an expression in the kernel: a number, a string, a list or a dictionary of them."""
        reply = self.client.execute_interactive(
            "", user_expressions={"asked": expression}, store_history=False, silent=True, timeout=60, allow_stdin=False
        )
        answer = reply["content"]["user_expressions"]["asked"]
        assert answer["status"] == "ok", f"{expression}: {answer.get('evalue')}"
        return ast.literal_eval(answer["data"]["text/plain"])

    def until(self, expression: str, expected: Any, seconds: float = 30) -> None:
        """Wait until an expression has a value in the kernel."""
        end = time.monotonic() + seconds
        while (value := self.ask(expression)) != expected:
            assert time.monotonic() < end, f"{expression} is {value!r}, not {expected!r}, after {seconds} s"
            self.page.wait_for_timeout(50)

    def cell(self, text: str) -> Locator:
        """The code cell that contains a text."""
        return self.panel.locator(".jp-CodeCell", has_text=text).first

    def close(self) -> None:
        """Photograph and close the page, then end the kernel: an open page would complain of widgets that are gone."""
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{Path(self.name).stem}-end.png")
        self.page.close()
        self.client.stop_channels()
        self.lab.end_kernel_of(self.name)


class Widget:
    """An explorer or a living scene on the page, and the variable that holds it in the kernel.

    Args:
        notebook: where it is shown.
        cell: text of the cell that shows it.
        name: the variable.
    """

    def __init__(self, notebook: Notebook, cell: str, name: str) -> None:
        self.notebook, self.name, self.page = notebook, name, notebook.page
        self.ask, self.until = notebook.ask, notebook.until
        self.area = notebook.cell(cell).locator(".jp-OutputArea-output").first
        expect(self.area.locator(".kdlab-canvas canvas").first).to_be_visible(timeout=60_000)

    def run(self, code: str) -> None:
        """Statements in the kernel."""
        self.ask(f"exec({code!r})")

    def scroll(self) -> None:
        """Bring the maps into sight."""
        self.area.locator(".kdlab-maps").scroll_into_view_if_needed()

    def photograph(self, name: str) -> None:
        """Keep a picture of the whole widget, in a window that is high enough for it."""
        size = self.page.viewport_size
        box = self.area.bounding_box()
        assert size and box
        self.page.set_viewport_size({"width": size["width"], "height": max(size["height"], int(box["height"]) + 200)})
        self.area.scroll_into_view_if_needed()
        self.page.wait_for_timeout(300)
        self.area.screenshot(path=SCREENSHOTS / f"{name}.png")
        self.page.set_viewport_size(size)

    def map_box(self) -> FloatRect:
        """Where the first map is on the page."""
        self.scroll()
        box = self.area.locator(".kdlab-maps canvas").first.bounding_box()
        assert box
        return box

    def drawn(self, seconds: float = 60) -> None:
        """Until nothing is being made and the last update is on the screen."""
        self.until(f"{self.name}.wait(60) and {self.name}.canvas.shown == {self.name}.canvas.serial", True, seconds)
        serial = self.ask(f"{self.name}.canvas.serial")
        expect(self.area.locator(".kdlab-canvas")).to_have_attribute("data-shown", str(serial))

    def pixels(self) -> list[str]:
        """What the maps show."""
        self.page.wait_for_timeout(100)
        return self.area.locator(".kdlab-maps canvas").evaluate_all("all => all.map(c => c.toDataURL())")

    def colours(self) -> list[int]:
        """How many colours each map shows."""
        count = (
            "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
        )
        return self.area.locator(".kdlab-maps canvas").evaluate_all(f"all => all.map({count})")

    def control(self, name: str) -> Locator:
        """The control with this label."""
        label = self.page.locator(".widget-label", has_text=re.compile(rf"^\s*{re.escape(name)}\s*$"))
        return self.area.locator(":has(> .widget-label)").filter(has=label).last

    def handle(self, name: str) -> Locator:
        """The handle of the slider with this label."""
        return self.control(name).locator(".noUi-handle")

    def slide(self, name: str, *keys: str) -> None:
        """Move a slider by keys."""
        handle = self.handle(name)
        handle.focus()
        for key in keys:
            handle.press(key)

    def pick(self, name: str, option: str) -> None:
        """Choose from a list."""
        self.control(name).locator("select").select_option(label=option)

    def time_steps(self, name: str, keys: Sequence[str]) -> list[float]:
        """Milliseconds from a key on a slider until what it asks for is painted, key by key, taken in the page."""
        canvas = self.area.locator(".kdlab-canvas")
        canvas.evaluate(
            """root => {
                root.taken = [];
                if (root.timed) return;
                root.timed = true;
                let since = null;
                document.addEventListener("keydown", () => { since = performance.now(); }, true);
                new MutationObserver(() => {
                    if (since !== null) root.taken.push(performance.now() - since);
                    since = null;
                }).observe(root, { attributes: true, attributeFilter: ["data-shown"] });
            }"""
        )
        handle = self.handle(name)
        handle.focus()
        for count, key in enumerate(keys, 1):
            handle.press(key)
            self.page.wait_for_function("([root, n]) => root.taken.length >= n", arg=[canvas.element_handle(), count])
            self.page.wait_for_timeout(300)  # what the kernel prepares after a step is none of that step's time
        return canvas.evaluate("root => root.taken")
