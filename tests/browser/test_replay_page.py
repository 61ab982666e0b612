"""A replay opened from a disk, without a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from browser_lab import Complaints
from playwright.sync_api import Browser, Page, expect

from kdlab.data.batch import collate
from kdlab.distill import Cells, TermResult
from kdlab.geometry import BEVGrid, yaw_pose
from kdlab.sample import Boxes3D, Detections, Features, Sample
from kdlab.view.replay import write_replay
from kdlab.view.sight.data import Sight

GRID = BEVGrid.square(32.0, 2.0)


def sample_of(step: int) -> Sample:
    """Six cameras that look outwards, a car that drives ahead."""
    axes = torch.tensor([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    poses = [yaw_pose(math.radians(yaw), (0, 0, 1.5)) @ axes for yaw in (0, -55, -110, 180, 110, 55)]
    box = torch.tensor([[8.0 + 4 * step, 2, 1, 4, 2, 1.5, 0, 0, 0]])
    cloud = torch.rand(400, 5, generator=torch.Generator().manual_seed(step)) * torch.tensor([60.0, 60, 3, 1, 0])
    cloud[:, :2] -= 30
    return Sample(
        token=f"token {step}",
        scene="scene",
        timestamp=float(step),
        images=torch.full((1, 6, 3, 36, 88), 60 + 40 * step, dtype=torch.uint8),
        image_from_camera=torch.tensor([[60.0, 0, 44], [0, 60, 16], [0, 0, 1]]).expand(1, 6, 3, 3).clone(),
        frame_from_camera=torch.stack(poses)[None].float(),
        key_from_frame=torch.eye(4)[None],
        frame_times=torch.zeros(1),
        points=cloud,
        boxes=Boxes3D.make(box, torch.tensor([0])),
        global_from_key=torch.eye(4, dtype=torch.float64),
        bev_augmentation=torch.eye(4),
        lidar_origin=torch.tensor([0.9, 0.0, 1.8]),
    )


def sight_of(step: int) -> Sight:
    """Teacher and student whose maps are bright where the car is."""
    sample = sample_of(step)
    distance = (GRID.centres() - sample.boxes.values[0, :2]).norm(dim=-1)
    teacher = torch.stack([torch.exp(-distance / k) for k in (2, 4, 8, 16)])[None]
    features = [Features(bev=m, stages=(m[..., ::2, ::2],)) for m in (teacher, 0.3 * (step + 1) * teacher)]
    detections = Detections(sample.boxes.values + 0.4, torch.tensor([0]), torch.tensor([0.6]))
    result = TermResult.of((distance < 6).float()[None] / (step + 1), Cells(), GRID)
    return Sight(
        sample, collate([sample]), GRID, *features, detections={"student": detections}, results={"feature": result}
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "replay.html"
    sights = [sight_of(step) for step in range(3)]
    return write_replay(path, sights, ("bev", "stages[0]"), title="A car ahead", labels=["start", "middle", "end"])


@pytest.fixture
def replay(browser: Browser, file: Path) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1300, "height": 1000}, offline=True)
    page = context.new_page()
    complaints = Complaints()
    complaints.listen(page)
    page.goto(file.as_uri())
    wait(page)
    yield page
    context.close()
    assert not complaints.messages, "\n".join(complaints.messages)


def wait(page: Page) -> None:
    """Until frames and pictures are on the screen."""
    page.wait_for_function("Number(document.querySelector('.kdlab-canvas')?.dataset.shown) > 0", timeout=10_000)


READ = "c => c.getContext('2d').getImageData(c.width / 2, 3, 1, 1).data[0]"


def brightness(page: Page) -> float:
    return float(page.locator(".kdlab-camera canvas").first.evaluate(READ))


def test_frames_are_stepped_played_and_named(replay: Page) -> None:
    name = replay.locator(".replay-name")
    expect(name).to_have_text("start")
    expect(replay.locator(".kdlab-title")).to_have_text(
        ["teacher: bev, norm", "student: bev, norm", "student − teacher", "all terms: 32"]
    )
    first = brightness(replay)
    replay.get_by_label("next frame").click()
    expect(name).to_have_text("middle")
    expect(replay.locator(".kdlab-title").nth(3)).to_have_text("all terms: 16")
    replay.wait_for_function(
        f"least => ({READ})(document.querySelector('.kdlab-camera canvas')) > least", arg=first + 20
    )
    assert brightness(replay) == pytest.approx(first + 40, abs=6)
    replay.get_by_label("frame before").click()
    replay.get_by_label("frame before").click()
    expect(name).to_have_text("end")  # around the ends
    replay.get_by_label("play", exact=True).click()
    expect(name).to_have_text("middle")
    replay.get_by_label("stop", exact=True).click()
    shown = name.inner_text()
    replay.wait_for_timeout(800)
    expect(name).to_have_text(shown)
    replay.get_by_label("frame", exact=True).fill("2")
    expect(name).to_have_text("end")


def test_pickers_and_thresholds(replay: Page) -> None:
    titles = replay.locator(".kdlab-title")
    replay.get_by_label("stage").select_option("stages[0]")
    expect(titles.first).to_have_text("teacher: stages[0], norm")
    replay.get_by_label("shown as").select_option("pca")
    expect(titles.nth(1)).to_have_text("student: stages[0], PCA")
    replay.get_by_label("term").select_option("")
    expect(titles).to_have_count(3)
    legend = replay.locator(".kdlab-legend")
    expect(legend).to_have_text("truth (1)student (1, score ≥ 0.3)")
    replay.get_by_label("boxes: score from").fill("0.7")
    expect(legend).to_have_text("truth (1)student (0, score ≥ 0.7)")
    replay.get_by_label("boxes", exact=True).uncheck()
    expect(legend).to_have_text("")
    replay.get_by_role("checkbox", name="mask").check()
    replay.get_by_label("points").check()
    expect(legend).to_have_text("mask ≥ 0.5")
    replay.get_by_label("cameras").uncheck()
    expect(replay.locator(".kdlab-cameras")).to_be_hidden()


def test_cells_are_read_and_keys_step(replay: Page) -> None:
    maps = replay.locator("canvas.kdlab-map")
    maps.first.click(position={"x": 150, "y": 90})
    expect(replay.locator(".kdlab-value").first).not_to_have_text("")
    expect(replay.locator(".kdlab-readout")).to_contain_text("row")
    replay.keyboard.press("]")
    expect(replay.locator(".replay-name")).to_have_text("middle")
    replay.keyboard.press("Space")
    expect(replay.get_by_label("stop", exact=True)).to_be_visible()
    replay.keyboard.press("Space")
    expect(replay.get_by_label("play", exact=True)).to_be_visible()


def test_it_is_small_and_fills_the_page(replay: Page, photograph_of: Callable[[Page, str], Path], file: Path) -> None:
    assert file.stat().st_size < 1_000_000
    replay.get_by_label("points").check()
    replay.wait_for_timeout(200)
    photograph_of(replay, "replay")
    box = replay.locator(".kdlab-maps").bounding_box()
    assert box is not None and box["height"] > 200
