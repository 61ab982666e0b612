"""Notebook 09 in JupyterLab: every control of explorer and living scene, with the page and the kernel both asked."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser_lab import Lab, Notebook, Widget, opened_page
from playwright.sync_api import Browser, Page, expect

pytestmark = pytest.mark.timeout(600)

PLACE = re.compile(r"x ([+−-]?[\d.]+) m, y ([+−-]?[\d.]+) m")
STEPS = 12  # slider steps whose time is taken
WAITED = 1500  # milliseconds: more than a step that waits for nothing takes even on a busy machine


@pytest.fixture(scope="module")
def opened(browser: Browser, lab: Lab) -> Iterator[Notebook]:
    """Notebook 09 after all its cells have run; the tests of this file use it one after the other."""
    with opened_page(browser, "explorer-end") as page:
        notebook = Notebook(page, lab, "09_explorer.ipynb")
        notebook.run_all(400)
        yield notebook
        notebook.rendered()
        notebook.close()


@pytest.fixture(scope="module")
def explorer(opened: Notebook) -> Widget:
    assert opened.ask("explorer.wait(90)")
    return Widget(opened, "explorer = BEVExplorer", "explorer")


@pytest.fixture(scope="module")
def living(opened: Notebook) -> Widget:
    assert opened.ask("living.wait(90)")
    return Widget(opened, "living = LivingScene", "living")


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def place_at(widget: Widget, across: float, down: float) -> tuple[float, float]:
    """What the page says of a point of the first map, given in shares of its picture."""
    box = widget.map_box()
    widget.page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
    readout = widget.area.locator(".kdlab-readout")
    expect(readout).to_contain_text(PLACE)
    found = PLACE.search(readout.inner_text())
    assert found
    return number(found[1]), number(found[2])


def point_of(widget: Widget, x: float, y: float) -> tuple[float, float]:
    """The page's pixel of a place in metres, from two readings of the page itself."""
    (x0, y0), (x1, y1) = place_at(widget, 0.3, 0.3), place_at(widget, 0.7, 0.7)
    box = widget.map_box()
    across, down = 0.3 + 0.4 * (y - y0) / (y1 - y0), 0.3 + 0.4 * (x - x0) / (x1 - x0)
    return box["x"] + across * box["width"], box["y"] + down * box["height"]


def test_everything_is_drawn(opened: Notebook, explorer: Widget) -> None:
    opened.rendered()
    titles = explorer.area.locator(".kdlab-maps").inner_text()
    assert all(word in titles for word in ("teacher", "student", "student − teacher")), titles
    pictures = explorer.area.locator(".kdlab-cameras canvas, .kdlab-cameras img")
    assert pictures.count() == 6
    assert opened.ask("explorer.canvas.shown == explorer.canvas.serial")
    colours = explorer.colours()
    assert min(colours) > 20, f"number of colours in each map: {colours}"
    explorer.photograph("explorer")


def test_each_slider_moves_the_kernel_and_the_page(explorer: Widget) -> None:
    explorer.until("explorer.frame.value", 0)
    for name, value, keys in (
        ("frame", "explorer.frame.value", ["ArrowRight"]),
        ("boxes: score from", "round(explorer.min_score.value, 2)", ["ArrowRight"] * 3),
        ("mask: value from", "round(explorer.mask_threshold.value, 2)", ["ArrowLeft"] * 3),
    ):
        before = explorer.ask(value)
        explorer.slide(name, *keys)
        step = 1 if name == "frame" else round(0.03 if keys[0] == "ArrowRight" else -0.03, 2)
        explorer.until(value, round(before + step, 2))
    explorer.drawn()
    assert explorer.ask("explorer.canvas.min_score") == pytest.approx(0.33)
    assert explorer.ask("explorer.album.sight(explorer._shown).sample.token == frames[1].sample.token")


def test_channels_have_their_slider(explorer: Widget) -> None:
    explorer.pick("shown as", "one channel")
    explorer.drawn()
    before = explorer.pixels()
    explorer.slide("channel", "ArrowRight", "ArrowRight")
    explorer.until("explorer.channel.value", 2)
    explorer.drawn()
    assert explorer.pixels() != before
    explorer.pick("shown as", "PCA as colours")
    explorer.until("explorer.view.value", "pca")
    explorer.pick("shown as", "norm over channels")
    explorer.drawn()


def test_stages_terms_and_gradients_are_picked(explorer: Widget) -> None:
    explorer.pick("stage", "heatmap")
    explorer.until("explorer.stage.value", "heatmap")
    explorer.pick("term", "false_positive_H")
    explorer.until("explorer.term.value", "false_positive_H")
    explorer.drawn()
    expect(explorer.area.locator(".kdlab-maps")).to_contain_text("false_positive_H")
    before = explorer.pixels()
    explorer.area.get_by_role("button", name="gradient").click()
    explorer.until("explorer.what.value", "gradient")
    explorer.drawn()
    assert explorer.pixels() != before
    explorer.area.get_by_role("button", name="loss").click()
    explorer.pick("stage", "bev")
    explorer.until("explorer.stage.value", "bev")
    explorer.drawn()


def test_a_click_picks_the_cell_under_it(explorer: Widget) -> None:
    x, y = place_at(explorer, 0.62, 0.31)
    explorer.page.mouse.down()
    explorer.page.mouse.up()
    row, column = explorer.ask(f"[int(v) for v in observer.grid.locate(torch.tensor([{x}, {y}]))[1::-1]]")
    explorer.until("explorer.canvas.cell", [row, column])
    explorer.drawn()
    report = explorer.area.get_by_text("LiDAR points").first
    expect(report).to_be_visible()
    explorer.area.locator(".kdlab-maps").focus()
    explorer.page.keyboard.press("ArrowUp")  # forward is up: one column on
    explorer.until("explorer.canvas.cell", [row, column + 1])
    explorer.drawn()
    explorer.photograph("cell")


@pytest.mark.parametrize("name", ["boxes", "points", "mask", "cameras"])
def test_toggles_act(explorer: Widget, name: str) -> None:
    before = explorer.ask(f"explorer.canvas.show['{name}']")
    look = explorer.pixels()
    box = explorer.area.get_by_role("checkbox", name=name, exact=True)
    box.set_checked(not before)
    explorer.until(f"explorer.canvas.show['{name}']", not before)
    explorer.page.wait_for_timeout(300)
    if name == "cameras":
        expect(explorer.area.locator(".kdlab-cameras")).to_be_visible(visible=not before)
    else:
        assert explorer.pixels() != look
    box.set_checked(before)
    explorer.until(f"explorer.canvas.show['{name}']", before)


def test_play_and_stop(explorer: Widget) -> None:
    first = explorer.ask("explorer.frame.value")
    explorer.area.get_by_role("button", name="play").click()
    explorer.until("explorer.play.value", True)
    explorer.until(f"explorer.frame.value not in ({first}, {first + 1})", True, 90)
    explorer.area.get_by_role("button", name="stop").click()
    explorer.until("explorer.play.value", False)
    stopped = explorer.ask("explorer.frame.value")
    explorer.page.wait_for_timeout(1200)
    still, frames = explorer.ask("explorer.frame.value"), explorer.ask("len(explorer.album)")
    assert still in (stopped, (stopped + 1) % frames)
    explorer.area.locator(".kdlab-maps").focus()
    explorer.page.keyboard.press("]")
    explorer.until("explorer.frame.value", (still + 1) % frames)


def test_a_slider_step_reaches_the_screen_quickly(explorer: Widget) -> None:
    """From the key press to the paint, with features computed: networks, kernel, messages and drawing are all in it."""
    frames = explorer.ask("len(explorer.album)")
    for _ in range(frames):  # every frame's features are computed once
        explorer.run("explorer.step(1); explorer.wait(60)")
    explorer.drawn()
    explorer.run("explorer.frame.value = 0; explorer.wait(60)")
    explorer.drawn()
    times = explorer.time_steps("frame", ["ArrowRight"] * min(STEPS, frames - 1))
    middle, worst = statistics.median(times), max(times)
    print(f"\nframe slider to screen: median {middle:.0f} ms, slowest {worst:.0f} ms, {len(times)} steps", end="; ")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    assert middle < WAITED


def test_the_living_scene_follows_its_sliders(living: Widget) -> None:
    living.drawn()
    for name, value, key in (
        ("ahead (m)", "living.changes.moved", "ArrowRight"),
        ("left (m)", "living.changes.moved", "ArrowRight"),
        ("turn (°)", "living.changes.moved", "ArrowRight"),
        ("fog", "living.changes.fog", "ArrowRight"),
        ("night", "living.changes.night", "ArrowRight"),
        ("drop-out", "living.changes.dropout", "ArrowRight"),
        ("yaw (°)", "living.changes.calibration", "ArrowRight"),
        ("pitch (°)", "living.changes.calibration", "ArrowRight"),
        ("roll (°)", "living.changes.calibration", "ArrowRight"),
        ("boxes: score from", "living.canvas.min_score", "ArrowRight"),
        ("beams", "living.changes.beams", "ArrowLeft"),
    ):
        before = living.ask(f"repr({value})")
        look = living.pixels()
        living.slide(name, key, key)
        living.until(f"repr({value}) != {before!r}", True)
        assert living.ask("living.wait(60)")
        living.drawn()
        assert living.pixels() != look, f"{name} changed nothing on the page"
    assert living.ask("living.sight.sample.points.shape[0] < living.before.sample.points.shape[0]")
    living.slide("mask: value from", "ArrowRight")
    living.until("living.canvas.mask_threshold > 0.5", True)
    times = living.ask("living.seconds")
    print(f"\nliving scene, last change: {times}")
    living.photograph("living")
    living.run("living.reset_all(); living.wait(60)")


def test_an_object_is_dragged(living: Widget) -> None:
    assert living.ask("not living.changes.moved and living.wait(60)")
    living.drawn()
    living.scroll()
    x, y = living.ask("living.world.box_of(living.object.value, living.changes).values[0, :2].tolist()")
    agent = living.ask("living.object.value")
    start, end = point_of(living, x, y), point_of(living, x + 6, y)
    mouse = living.page.mouse
    mouse.move(*start)
    mouse.down()
    mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, steps=4)
    mouse.move(*end, steps=4)
    mouse.up()
    living.until(f"{agent} in living.changes.moved", True)
    ahead, left, _ = living.ask(f"list(living.changes.moved[{agent}])")
    assert ahead == pytest.approx(6, abs=1.5) and left == pytest.approx(0, abs=1.5)
    assert living.ask("living.wait(60)")
    living.drawn()


def test_the_scene_in_three_dimensions(opened: Notebook, photograph_of: Callable[[Page, str], Path]) -> None:
    plot = opened.cell("figure = scene(").locator(".js-plotly-plot")
    plot.scroll_into_view_if_needed()
    expect(plot.locator("canvas").first).to_be_visible(timeout=30_000)
    names = plot.locator(".legendtext").all_text_contents()
    assert any(name.startswith("truth") for name in names) and any(name.startswith("student") for name in names)
    photograph_of(opened.page, "scene3d")
    place = next(k for k, name in enumerate(names) if name.startswith("truth"))
    plot.locator(".legendtoggle").nth(place).click()
    truth = "[t.visible for t in figure.data if t.legendgroup == 'truth']"
    opened.until(truth, ["legendonly", "legendonly"])
