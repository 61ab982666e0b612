"""The canvas alone in a page, with a model that a test drives: no kernel, no JupyterLab."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
from playwright.sync_api import Locator, Page

from kdlab.geometry import BEVGrid
from kdlab.view.sight.layers import Layer
from kdlab.view.widgets.canvas import STATIC, Canvas, mask_bytes, panel_of

MODEL = """
class Model {
  constructor(state) { this.state = state; this.listeners = {}; this.sent = []; }
  get(name) { return this.state[name]; }
  on(name, listener) { (this.listeners[name] ??= []).push(listener); }
  off(name, listener) { this.listeners[name] = (this.listeners[name] ?? []).filter((one) => one !== listener); }
  set(name, value) { this.sent.push([name, value]); this.take({ [name]: value }); }
  save_changes() {}
  take(changes) {
    Object.assign(this.state, changes);
    for (const name of Object.keys(changes)) for (const heard of this.listeners[`change:${name}`] ?? []) heard();
  }
}
const revived = (value) => {
  if (value === null || typeof value !== "object") return value;
  if (value.bytes !== undefined) return new DataView(Uint8Array.from(atob(value.bytes), (c) => c.charCodeAt(0)).buffer);
  if (Array.isArray(value)) return value.map(revived);
  return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, revived(one)]));
};
window.take = (changes) => window.model.take(revived(changes));
window.mount = (state) => {
  window.model = new Model(revived(state));
  window.unmount = renderCanvas({ model: window.model, el: document.getElementById("here") });
};
"""


def plain(value: Any) -> Any:
    """Traits as JSON; bytes in base64."""
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def traits_of(canvas: Canvas) -> dict[str, Any]:
    """What a canvas tells its page."""
    left = {"layout", "tabbable", "tooltip", "comm"}
    names = [name for name in canvas.traits(sync=True) if not name.startswith("_") and name not in left]
    return {name: plain(getattr(canvas, name)) for name in names}


class Mounted:
    """A canvas in a page."""

    def __init__(self, page: Page, canvas: Canvas, style: str = "") -> None:
        self.page = page
        script = (STATIC / "canvas.js").read_text() + MODEL
        head = f'<meta charset="utf-8"><style>{(STATIC / "canvas.css").read_text()}{style}</style>'
        page.set_content(f'<!doctype html>{head}<div id="here"></div><script type="module">{script}</script>')
        page.wait_for_function("() => Boolean(window.mount)")
        page.evaluate("mount", traits_of(canvas))
        self.root = page.locator(".kdlab-canvas")
        self.shown(canvas.serial)

    def take(self, **changes: Any) -> None:
        """A message from Python."""
        self.page.evaluate("take", plain(changes))

    def shown(self, serial: int) -> None:
        """Wait until an update is on the screen."""
        self.page.wait_for_function(
            f'document.querySelector(".kdlab-canvas").dataset.shown === "{serial}"', timeout=10_000
        )

    def settle(self) -> None:
        """Wait until all that was asked for is drawn."""
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def sent(self, name: str) -> list[Any]:
        """What the page wrote to a trait, in order."""
        return [value for trait, value in self.page.evaluate("model.sent") if trait == name]

    def map(self, index: int) -> Locator:
        return self.root.locator("canvas.kdlab-map").nth(index)

    def at(self, x: float, y: float) -> dict[str, float]:
        """The place of metres on a map, as Playwright takes it; the margins are those of canvas.js."""
        width = self.map(0).bounding_box()["width"]  # type: ignore[index]
        x1, y1 = self.page.evaluate("[model.get('extent')[1], model.get('extent')[3]]")
        scale = (width - 48) / (2 * y1)
        return {"x": 42 + (y1 - y) * scale, "y": 4 + (x1 - x) * scale}

    def colour(self, index: int, x: float, y: float) -> tuple[int, ...]:
        """The pixel of a map at a place in metres."""
        place = self.at(x, y)
        read = """(canvas, [x, y]) => {
          const ratio = canvas.width / canvas.clientWidth;
          return [...canvas.getContext("2d").getImageData(x * ratio, y * ratio, 1, 1).data.slice(0, 3)];
        }"""
        return tuple(self.map(index).evaluate(read, [place["x"], place["y"]]))

    def picture(self, index: int) -> bytes:
        """All pixels of a map."""
        read = 'c => JSON.stringify([...c.getContext("2d").getImageData(0, 0, c.width, c.height).data])'
        return bytes(json.loads(self.map(index).evaluate(read)))


def example(**traits: Any) -> Canvas:
    """Three maps of 16 x 16 cells over 32 m: x, y, and colours; one cell is no number."""
    grid = BEVGrid.square(16.0, 2.0)
    centres = grid.centres().numpy()
    x, y = centres[..., 0].copy(), centres[..., 1].copy()
    x[0, 0] = np.nan  # right behind
    colours = np.zeros((16, 16, 3), np.uint8)
    colours[8:, 8:] = (200, 100, 50)  # ahead on the left
    layers = [
        Layer("map of x", x, -15, 15, "viridis", "m"),
        Layer("map of y", y, -15, 15, "RdBu_r"),
        Layer("colours", colours),
    ]
    mask = mask_bytes((centres[..., 0] > 0) * 0.6)
    given = {"panels": [panel_of(layer) for layer in layers], "mask": mask, "serial": 1, **traits}
    return Canvas.over(grid, **given)
