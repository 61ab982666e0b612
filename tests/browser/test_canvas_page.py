"""The canvas in Chromium: what it draws, what it reads, what it tells Python."""

from __future__ import annotations

from statistics import median
from typing import Any

import cv2
import numpy as np
import pytest
from canvas_page import Mounted, example, plain
from playwright.sync_api import Page, expect

from kdlab.view.widgets.canvas import palettes

TRUTH = {"colour": "#009E73", "dash": [], "scored": False, "lines": [], "rows": [[6, 6, 6, 4, 0.0, 1.0, 0]]}
STUDENT = {"colour": "#D55E00", "dash": [2, 2], "scored": True, "lines": [], "rows": [[-8, -8, 6, 4, 0.0, 0.5, 8]]}


@pytest.fixture
def canvas(page: Page) -> Mounted:
    return Mounted(page, example())


def ramp(name: str, share: float) -> tuple[int, ...]:
    at = 3 * min(255, int(share * 256))
    return tuple(palettes()[name][at : at + 3])


def near(seen: tuple[int, ...], expected: tuple[int, ...], by: int = 3) -> bool:
    return all(abs(a - b) <= by for a, b in zip(seen, expected, strict=True))


def test_numbers_become_the_right_colours_in_the_right_places(canvas: Mounted) -> None:
    assert near(canvas.colour(0, 15, -9), ramp("viridis", 1.0)), "forward is up"
    assert near(canvas.colour(0, -13, -9), ramp("viridis", 2 / 30))
    assert near(canvas.colour(1, -9, 15), ramp("RdBu_r", 1.0)), "left is on the left"
    assert near(canvas.colour(1, -9, -13), ramp("RdBu_r", 2 / 30))
    assert near(canvas.colour(2, 9, 9), (200, 100, 50)) and near(canvas.colour(2, 9, -9), (0, 0, 0))
    assert near(canvas.colour(0, -15, -15), (184, 184, 184)), "no number is grey"
    titles = canvas.root.locator(".kdlab-title").all_inner_texts()
    assert titles == ["map of x", "map of y", "colours"]
    assert canvas.root.locator(".kdlab-bar").first.inner_text().split() == ["−15", "15", "m"]
    expect(canvas.root.locator(".kdlab-bar").nth(2)).to_be_hidden()


def test_hovering_reads_every_map_without_python(canvas: Mounted) -> None:
    canvas.map(1).hover(position=canvas.at(7, -5))
    expect(canvas.root.locator(".kdlab-value").nth(0)).to_have_text("7")
    expect(canvas.root.locator(".kdlab-value").nth(1)).to_have_text("−5")
    expect(canvas.root.locator(".kdlab-value").nth(2)).to_have_text("")
    expect(canvas.root.locator(".kdlab-readout")).to_contain_text("row 5, column 11")
    before = canvas.colour(0, 13, -13)
    canvas.map(1).hover(position=canvas.at(13, -5))  # the cross is on the other maps as well
    canvas.settle()
    assert canvas.colour(0, 13, -13) != before
    canvas.page.mouse.move(5, 900)
    expect(canvas.root.locator(".kdlab-readout")).to_contain_text("Point at a map")
    assert not canvas.sent("cell") and not canvas.sent("dragged")


def test_a_click_and_the_arrow_keys_choose_a_cell(canvas: Mounted) -> None:
    canvas.map(0).click(position=canvas.at(7, -5))
    assert canvas.sent("cell") == [[5, 11]]
    for key in ("ArrowUp", "ArrowLeft", "ArrowDown", "ArrowRight", "Shift+ArrowLeft", "Escape"):
        canvas.page.keyboard.press(key)
    assert canvas.sent("cell")[1:] == [[5, 12], [6, 12], [6, 11], [5, 11], [10, 11], []]
    canvas.page.keyboard.press("ArrowUp")  # from the middle where there was none
    assert canvas.sent("cell")[-1] == [8, 9]
    for _ in range(3):
        canvas.page.keyboard.press("Shift+ArrowUp")
    assert canvas.sent("cell")[-1] == [8, 15], "it stays on the map"
    canvas.page.mouse.move(5, 900)
    expect(canvas.root.locator(".kdlab-readout")).to_contain_text("row 8, column 15")
    expect(canvas.root.locator(".kdlab-voice")).to_have_text("x 15.0 metres, y 1.0 metres, map of x 15, map of y 1")


def test_cells_count_on_the_finest_grid(page: Page) -> None:
    canvas = Mounted(page, example(cells=[64, 64]))
    canvas.map(0).click(position=canvas.at(-15.8, 15.8))
    assert canvas.sent("cell") == [[63, 0]]
    expect(canvas.root.locator(".kdlab-value").first).to_have_text("−15")


def test_other_keys_go_to_python_and_not_to_jupyter(canvas: Mounted) -> None:
    page = canvas.page
    page.evaluate("window.heard = []; document.body.addEventListener('keydown', (event) => heard.push(event.key))")
    canvas.map(0).click(position=canvas.at(7, -5))
    for key in ("Space", "x", "]", "PageDown"):
        page.keyboard.press(key)
    assert canvas.sent("key") == ["space:1", "x:2", "]:3", "pagedown:4"]
    assert page.evaluate("heard") == [] and page.evaluate("scrollY") == 0
    assert canvas.root.get_attribute("data-lm-suppress-shortcuts") == "true"


def test_it_is_reached_with_tab_and_says_what_it_is(canvas: Mounted) -> None:
    maps = canvas.root.locator(".kdlab-maps")
    canvas.page.keyboard.press("Tab")
    expect(maps).to_be_focused()
    assert maps.evaluate("e => getComputedStyle(e).outlineStyle") == "solid", "a ring shows where the keys go"
    expect(maps).to_have_attribute("aria-label", "Bird's-eye-view maps; arrow keys move the chosen cell, "
                                   "Escape lets go of it, plus and minus zoom")  # fmt: skip
    canvas.page.keyboard.press("Tab")
    expect(maps).not_to_be_focused()


def test_thresholds_and_toggles_act_at_once(page: Page) -> None:
    canvas = Mounted(page, example(boxes={"truth": TRUTH, "student": STUDENT}))
    legend = canvas.root.locator(".kdlab-legend")
    expect(legend).to_have_text("truth (1)student (1, score ≥ 0.3)")
    green = (0, 158, 115)
    assert near(canvas.colour(0, 9, 5), green, 60), "the front side of the true box"
    with_both = canvas.picture(0)
    canvas.take(min_score=0.6)
    expect(legend).to_have_text("truth (1)student (0, score ≥ 0.6)")
    canvas.settle()
    assert canvas.picture(0) != with_both
    canvas.take(show={"boxes": False, "points": False, "mask": False})
    canvas.settle()
    assert near(canvas.colour(0, 9, 5), ramp("viridis", 24 / 30))
    canvas.take(show={"student": False})
    expect(legend).to_have_text("truth (1)")
    bright = canvas.colour(1, -9, 9)
    canvas.take(show={"boxes": False, "mask": True})
    canvas.settle()
    assert sum(canvas.colour(1, -9, 9)) < sum(bright) - 60, "outside the mask it is dim"
    assert near(canvas.colour(1, 9, 9), bright)
    expect(legend).to_have_text("mask ≥ 0.5")
    canvas.take(mask_threshold=0.7)  # the mask is 0.6 ahead
    canvas.settle()
    assert sum(canvas.colour(1, 9, 9)) < sum(bright) - 60


def test_boxes_under_the_pointer_are_named(page: Page) -> None:
    canvas = Mounted(page, example(boxes={"truth": TRUTH, "student": STUDENT}))
    readout = canvas.root.locator(".kdlab-readout")
    canvas.map(0).hover(position=canvas.at(-8, -9))
    expect(readout).to_contain_text("student: pedestrian 0.50")
    canvas.map(0).hover(position=canvas.at(7, 5))
    expect(readout).to_contain_text("truth: car")
    canvas.map(0).hover(position=canvas.at(0, -14))
    expect(readout).not_to_contain_text(":")


def test_dragging_is_reported_where_things_can_be_moved(page: Page) -> None:
    canvas = Mounted(page, example(boxes={"truth": TRUTH}, editable=True))
    box, start, end = canvas.map(0).bounding_box(), canvas.at(6, 6), canvas.at(-4, -6)
    assert box is not None
    before = canvas.picture(1)
    page.mouse.move(box["x"] + start["x"], box["y"] + start["y"])
    page.mouse.down()
    page.mouse.move(box["x"] + end["x"], box["y"] + end["y"], steps=3)
    canvas.settle()
    assert canvas.picture(1) != before and not canvas.sent("dragged"), "a ghost shows where it will be"
    page.mouse.up()
    (dragged,) = canvas.sent("dragged")
    assert dragged == pytest.approx([6, 6, -4, -6], abs=0.15) and not canvas.sent("cell")
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.keyboard.press("Escape")
    page.mouse.up()
    assert len(canvas.sent("dragged")) == 1, "Escape calls it off"
    canvas.take(editable=False)
    canvas.settle()
    canvas.map(0).drag_to(canvas.map(0), source_position=start, target_position=end)
    assert len(canvas.sent("dragged")) == 1


def test_zooming_shows_a_part(canvas: Mounted) -> None:
    canvas.map(0).dblclick(position=canvas.at(13, 13))
    canvas.page.mouse.move(5, 900)
    canvas.settle()
    place = canvas.at(-13, -13)  # of the whole map; now it shows what lies ahead on the left
    canvas.map(0).hover(position=place)
    expect(canvas.root.locator(".kdlab-value").nth(0)).to_have_text("7")
    expect(canvas.root.locator(".kdlab-value").nth(1)).to_have_text("7")
    canvas.page.keyboard.press("0")
    expect(canvas.root.locator(".kdlab-value").nth(0)).to_have_text("−13")
    for _ in range(3):
        canvas.page.keyboard.press("+")  # around the pointer, which stays over the corner
    expect(canvas.root.locator(".kdlab-value").nth(1)).to_have_text("−15")


def jpeg(colour: tuple[int, int, int]) -> bytes:
    return bytes(cv2.imencode(".jpg", np.full((30, 60, 3), colour[::-1], np.uint8))[1].tobytes())


def pictures(colour: tuple[int, int, int]) -> list[dict[str, Any]]:
    return [{"name": f"camera {c}", "camera": c, "width": 120, "height": 60, "jpeg": jpeg(colour)} for c in (1, 0)]


def test_pictures_with_lines_and_pixels(page: Page) -> None:
    line = np.array([[1.0, 0, 10, 120, 10]], "<f4").tobytes()
    boxes = {"truth": {**TRUTH, "lines": [line, b""]}}
    canvas = Mounted(page, example(boxes=boxes, pictures=pictures((250, 0, 0)), pixels=[[0, 60, 40, 0.5]]))
    cameras = canvas.root.locator(".kdlab-camera canvas")
    expect(cameras).to_have_count(2)
    read = """(canvas, [u, v]) => {
      const scale = canvas.width / 120;
      return [...canvas.getContext("2d").getImageData(u * scale, v * scale, 1, 1).data.slice(0, 3)];
    }"""
    assert near(tuple(cameras.nth(1).evaluate(read, [30, 10])), (0, 158, 115), 40), "camera 0 stands second"
    assert near(tuple(cameras.nth(0).evaluate(read, [30, 10])), (250, 0, 0), 8)
    assert near(tuple(cameras.nth(1).evaluate(read, [60, 40])), (204, 121, 167), 40)
    expect(canvas.root.locator(".kdlab-legend")).to_contain_text("pixels that feed the cell")
    canvas.take(pictures=pictures((0, 0, 250)), boxes={}, pixels=[], serial=2)
    canvas.shown(2)
    assert near(tuple(cameras.nth(0).evaluate(read, [30, 10])), (0, 0, 250), 8)
    canvas.take(pictures=[{**pictures((0, 0, 0))[0], "jpeg": b"broken"}], serial=3)
    canvas.shown(3)
    assert near(tuple(cameras.nth(0).evaluate(read, [30, 10])), (184, 184, 184)), "grey, and no error"
    canvas.take(show={"cameras": False})
    expect(canvas.root.locator(".kdlab-cameras")).to_be_hidden()


def test_messages_faster_than_frames_draw_the_newest(page: Page) -> None:
    canvas = Mounted(page, example())
    changes = [plain({"pictures": pictures((10 * k, 0, 0)), "serial": 2 + k}) for k in range(20)]
    page.evaluate("all => { for (const one of all) take(one); }", changes)
    canvas.shown(21)
    assert canvas.sent("shown")[0] == 1 and canvas.sent("shown")[-1] == 21 and len(canvas.sent("shown")) < 6
    red = canvas.root.locator(".kdlab-camera canvas").first.evaluate(
        "c => c.getContext('2d').getImageData(20, 20, 1, 1).data[0]"
    )
    assert abs(red - 190) < 4


def test_nothing_flickers(canvas: Mounted) -> None:
    """At the end of no frame is a map empty, however often new ones come."""
    watch = """() => {
      const maps = [...document.querySelectorAll("canvas.kdlab-map")];
      const ctx = maps[0].getContext("2d", {}), panels = model.get("panels");
      window.empty = 0; window.frames = 0;
      const look = () => {
        window.frames += 1;
        if (ctx.getImageData(200, 60, 1, 1).data[3] !== 255) window.empty += 1;
        if (window.frames < 30) { take({ panels: structuredClone(panels), serial: 100 + window.frames });
          requestAnimationFrame(look); }
      };
      requestAnimationFrame(look);
    }"""
    canvas.page.evaluate(watch)
    canvas.page.wait_for_function("window.frames === 30")
    assert canvas.page.evaluate("window.empty") == 0


def test_maps_wrap_on_narrow_pages(canvas: Mounted) -> None:
    tops = lambda: {round(box["y"]) for k in range(3) if (box := canvas.map(k).bounding_box())}  # noqa: E731
    assert len(tops()) == 1
    canvas.page.set_viewport_size({"width": 640, "height": 900})
    canvas.settle()
    canvas.settle()
    assert len(tops()) == 2
    canvas.page.set_viewport_size({"width": 340, "height": 900})
    canvas.settle()
    canvas.settle()
    assert len(tops()) == 3
    assert canvas.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    canvas.map(0).click(position=canvas.at(7, -5))
    assert canvas.sent("cell") == [[5, 11]]


def test_it_is_sharp_on_dense_screens_and_follows_the_theme(page: Page) -> None:
    other = page.context.browser.new_context(device_scale_factor=2)  # type: ignore[union-attr]
    try:
        dark = ":root { --jp-ui-font-color1: #e0e0e0; } body { background: #111; }"
        canvas = Mounted(other.new_page(), example(), dark)
        width, shown = canvas.map(0).evaluate("c => [c.width, c.clientWidth]")
        assert width == 2 * shown
        frame = canvas.map(0).evaluate("c => [...c.getContext('2d').getImageData(300, 7, 1, 1).data.slice(0, 3)]")
        assert min(frame) > 200, "axes are light on dark"
        canvas.page.evaluate("document.documentElement.style.setProperty('--jp-ui-font-color1', '#101010')")
        canvas.settle()
        frame = canvas.map(0).evaluate("c => [...c.getContext('2d').getImageData(300, 7, 1, 1).data.slice(0, 3)]")
        assert max(frame) < 60
    finally:
        other.close()


def test_status_says_progress_and_errors(page: Page) -> None:
    canvas = Mounted(page, example(status="computing frame 3 …"))
    status = canvas.root.locator(".kdlab-status")
    expect(status).to_have_text("computing frame 3 …")
    expect(status).to_have_class("kdlab-status kdlab-busy")
    top = canvas.map(0).bounding_box()
    canvas.take(status="the student has no neck", panels=[], serial=2)
    expect(status).to_have_class("kdlab-status kdlab-notice")
    expect(status).to_have_attribute("role", "status")
    expect(canvas.root.locator(".kdlab-empty")).to_be_visible()
    canvas.take(status="", panels=[example().panels[0]], serial=3)
    canvas.shown(3)
    assert canvas.map(0).bounding_box()["y"] == top["y"], "a message moves nothing"  # type: ignore[index]


def test_taking_it_down_leaves_nothing(canvas: Mounted) -> None:
    canvas.page.evaluate("unmount()")
    canvas.take(serial=9, status="late")
    canvas.settle()
    assert canvas.page.evaluate("Object.values(model.listeners).every((of) => of.length === 0)")
    assert canvas.page.locator(".kdlab-canvas").count() == 0 and canvas.sent("shown") == [1]


def test_an_update_costs_little(canvas: Mounted) -> None:
    """From the message to the paint; two frames of the screen are the least that can be seen."""
    costs = []
    panels = example().panels
    for serial in range(2, 14):
        canvas.take(panels=panels, serial=serial)
        canvas.shown(serial)
        costs.append(float(canvas.root.get_attribute("data-cost") or "nan"))
    assert median(costs) < 100, costs


def test_another_number_of_maps_is_drawn_as_if_it_were_the_first(page: Page) -> None:
    canvas = Mounted(page, example())
    canvas.settle()
    panels = [*example().panels, example().panels[0]]  # a fourth map makes all of them narrower
    canvas.take(panels=panels, serial=2)
    canvas.shown(2)
    canvas.settle()
    later = canvas.picture(0)
    fresh = Mounted(page, example(panels=panels))
    fresh.settle()
    assert later == fresh.picture(0)
