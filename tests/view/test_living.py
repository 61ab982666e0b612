"""The living scene on a small simulated world and untrained networks: every control changes what it says."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sight_fakes import config_of, detector, observer_of

from kdlab.data.simulate_changes import Changes
from kdlab.data.simulate_config import SimulationConfig
from kdlab.data.simulate_live import LiveWorld
from kdlab.sample import Boxes3D, Detections
from kdlab.view.living import LivingScene
from kdlab.view.sight import Observer
from kdlab.view.sight.before_after import found_score, nearest
from kdlab.view.widgets.living_words import changes_in_words

CONFIG = SimulationConfig(
    scenes=3, keyframes=1, image_width=88, image_height=50, sweeps_per_keyframe=2, lidar_azimuth_steps=180, seed=4
)


@pytest.fixture(scope="module")
def world() -> LiveWorld:
    return LiveWorld(CONFIG, 0, 0, sweeps=2)


@pytest.fixture(scope="module")
def observer() -> Observer:
    return observer_of("labeldistill")


@pytest.fixture(scope="module")
def made(world: LiveWorld, observer: Observer) -> LivingScene:
    return LivingScene(world, observer=observer)


@pytest.fixture
def scene(made: LivingScene) -> Iterator[LivingScene]:
    made.reset_all()
    made._pick_first()
    yield ready(made)
    made.compare.value, made.view.value, made.stage.value = "change", "norm", "bev"
    ready(made)


def ready(scene: LivingScene) -> LivingScene:
    assert scene.wait(60)
    assert not scene.canvas.status, scene.canvas.status
    return scene


def titles(scene: LivingScene) -> list[str]:
    return [panel["title"] for panel in scene.canvas.panels]


def values(scene: LivingScene, title: str) -> np.ndarray:
    panel = scene.canvas.panels[titles(scene).index(title)]
    return panel["scale"] * np.frombuffer(panel["values"], np.float16).astype(float).reshape(panel["shape"])


def test_begins_with_the_world_as_it_is(scene: LivingScene) -> None:
    assert titles(scene) == [
        "teacher: bev, norm",
        "student: bev, norm",
        "label encoder: bev, norm",
        "teacher: change of bev",
        "student: change of bev",
    ]
    assert scene.changes == Changes()
    assert not values(scene, "student: change of bev").any()
    assert len(scene.canvas.pictures) == 6 and scene.canvas.points and scene.canvas.mask
    assert set(scene.canvas.boxes) == {"truth", "teacher", "student", "picked"}
    assert scene._names[scene.object.value] == "car"
    assert "as it is in the data set" in scene.place.value and "method <b>labeldistill" in scene.heading.value
    assert set(scene.seconds) == {"world", "networks", "maps"}


def test_move_turn_and_put_back(scene: LivingScene) -> None:
    agent = scene.object.value
    before = scene.canvas.boxes["picked"]["rows"][0]
    scene.ahead.value, scene.left.value, scene.turn.value = 2.0, -1.5, 90.0
    assert scene.changes == Changes(moved={agent: (2.0, -1.5, math.pi / 2)})
    after = scene.canvas.boxes["picked"]["rows"][0]  # at once, before anything is rendered
    assert np.allclose(np.subtract(after[:2], before[:2]), (2.0, -1.5), atol=2e-3)
    assert math.isclose(math.remainder(after[4] - before[4] - math.pi / 2, math.tau), 0, abs_tol=2e-3)
    ready(scene)
    assert values(scene, "teacher: change of bev").any() and values(scene, "student: change of bev").any()
    assert any(np.allclose(row[:5], after[:5], atol=2e-3) for row in scene.canvas.boxes["truth"]["rows"])
    assert "car" in scene.place.value and "+2.0 m ahead, -1.5 m left, turned +90°" in scene.place.value
    other = next(a for _, a in scene.object.options if a != agent)
    scene.object.value = other
    assert (scene.ahead.value, scene.turn.value) == (0.0, 0.0)
    scene.object.value = agent
    assert (scene.ahead.value, scene.left.value, scene.turn.value) == (2.0, -1.5, 90.0)
    scene.back.click()
    ready(scene)
    assert scene.changes == Changes() and scene.sight is scene.before


def test_remove_and_bring_back(scene: LivingScene) -> None:
    agent, count = scene.object.value, len(scene.canvas.boxes["truth"]["rows"])
    scene.remove.value = True
    ready(scene)
    assert scene.changes.removed == {agent} and scene.remove.description == "bring back"
    assert len(scene.canvas.boxes["truth"]["rows"]) < count
    assert "removed" in scene.report.value and "LiDAR points on it" in scene.report.value
    scene.remove.value = False
    assert ready(scene).changes == Changes()


def test_drag_and_click(scene: LivingScene) -> None:
    agent = next(a for _, a in scene.object.options if a != scene.object.value)
    x, y = scene.world.box_of(agent).values[0, :2].tolist()
    scene.canvas.dragged = [x + 0.1, y, x + 30.1, y + 4.0]
    ready(scene)
    assert scene.object.value == agent and scene.ahead.max >= 30
    assert np.allclose(scene.changes.moved[agent], (30.0, 4.0, 0.0), atol=1e-5)
    assert np.allclose(scene.canvas.boxes["picked"]["rows"][0][:2], (x + 30, y + 4), atol=2e-3)
    scene.canvas.dragged = [x + 30.1, y + 4, x + 25.1, y + 4]  # it lies at its new place now
    assert np.allclose(ready(scene).changes.moved[agent], (25.0, 4.0, 0.0), atol=1e-5)
    grid = scene.observer.grid
    first = scene.object.options[0][1]
    place = scene.world.box_of(first).values[0, :2]
    column, row, _ = grid.locate(place)
    scene.canvas.cell = [int(row), int(column)]
    column, row, _ = grid.locate(scene.world.box_of(scene.object.value, scene.changes).values[0, :2])
    assert max(abs(int(row) - scene.canvas.cell[0]), abs(int(column) - scene.canvas.cell[1])) <= 2
    scene.canvas.dragged = [-50.9, -50.9, 0.0, 0.0]
    assert "Nothing to move there" in scene.canvas.status
    scene.canvas.status = ""


def test_keys(scene: LivingScene) -> None:
    agent = scene.object.value
    for count, key in enumerate("wwaq"):
        scene.canvas.key = f"{key}:{count}"
    assert np.allclose(scene.changes.moved[agent], (1.0, 0.5, math.radians(5)))
    scene.canvas.key = "x:5"
    assert scene.changes.removed == {agent}
    scene.canvas.key = "r:6"
    assert ready(scene).changes == Changes()


def test_sensors(scene: LivingScene) -> None:
    points, pictures = len(scene.canvas.points), scene.canvas.pictures
    scene.beams.value = 8
    assert len(ready(scene).canvas.points) < 0.5 * points
    assert [p["jpeg"] for p in scene.canvas.pictures] == [p["jpeg"] for p in pictures]
    assert not values(scene, "student: change of bev").any()  # a camera student sees no points
    assert values(scene, "teacher: change of bev").any()
    scene.beams.value, scene.night.value = 32, 0.9
    assert ready(scene).changes == Changes(night=0.9)
    assert [p["jpeg"] for p in scene.canvas.pictures] != [p["jpeg"] for p in pictures]
    assert not values(scene, "teacher: change of bev").any() and values(scene, "student: change of bev").any()
    scene.fog.value, scene.dropout.value = 0.4, 0.5
    assert ready(scene).changes == Changes(night=0.9, fog=0.4, dropout=0.5)
    scene.reset.click()
    assert ready(scene).changes == Changes() and scene.fog.value == 0


def test_calibration(scene: LivingScene) -> None:
    pictures = scene.canvas.pictures
    scene.camera.value = "CAM_BACK"
    scene.yaw.value = 4.0
    ready(scene)
    assert scene.changes == Changes(calibration={"CAM_BACK": (4.0, 0.0, 0.0)})
    assert [p["jpeg"] for p in scene.canvas.pictures] == [p["jpeg"] for p in pictures]
    moved = values(scene, "student: change of bev")
    half = moved.shape[1] // 2  # columns go ahead
    assert moved[:, :half].sum() > 5 * moved[:, half + 1 :].sum()
    scene.camera.value = "CAM_FRONT"
    assert scene.yaw.value == 0
    scene.camera.value = "CAM_BACK"
    assert scene.yaw.value == 4
    scene.yaw.value = 0.0
    assert ready(scene).changes == Changes()


def test_what_is_shown(scene: LivingScene) -> None:
    scene.compare.value = "difference"
    assert "student − teacher" in titles(scene)
    scene.compare.value = "none"
    assert len(titles(scene)) == 3
    scene.view.value, scene.channel.value = "channel", 2
    assert titles(scene)[0] == "teacher: bev, channel 2"
    scene.view.value, scene.stage.value = "mean", "stages[1]"
    assert titles(scene)[:2] == ["teacher: stages[1], mean", "student: stages[1], mean"]
    masks = [scene.canvas.mask]
    scene.mask.value = "Gaussians"
    assert scene.canvas.mask not in masks
    scene.show_points.value = False
    assert scene.canvas.show["points"] is False
    scene.show_points.value = True


def test_colours_keep_their_scale(scene: LivingScene) -> None:
    scales = [(p["low"], p["high"]) for p in scene.canvas.panels[:3]]
    scene.night.value = 1.0
    assert [(p["low"], p["high"]) for p in ready(scene).canvas.panels[:3]] == scales


def test_the_newest_change_wins(scene: LivingScene, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Changes] = []
    sample = scene.world.sample
    monkeypatch.setattr(scene.world, "sample", lambda changes: asked.append(changes) or sample(changes))
    for fog in (0.1, 0.2, 0.3, 0.4):
        scene.fog.value = fog
    ready(scene)
    assert asked == [Changes(fog=0.4)]


def test_errors_are_told_and_the_scene_goes_on(scene: LivingScene, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(scene.world, "sample", lambda changes: 1 / 0)
        scene.fog.value = 0.1
        assert scene.wait(60)
        assert "Not drawn" in scene.canvas.status and "division by zero" in scene.canvas.status
    scene.fog.value = 0.2
    assert ready(scene).changes == Changes(fog=0.2) and values(scene, "student: change of bev").any()


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_one_side_alone(world: LiveWorld, side: str) -> None:
    config = config_of("LiDAR" if side == "teacher" else "BEVDepth")
    network = detector(config.detector, 0)
    alone = Observer(*((network, None) if side == "teacher" else (None, network)), config=config)
    fitting = world
    if alone.sensors.sweeps != world.sweeps:
        with pytest.raises(ValueError, match="make it with LiveWorld"):
            LivingScene(world, observer=alone)
        fitting = LiveWorld(CONFIG, 0, 0, sweeps=alone.sensors.sweeps, frames=alone.sensors.frames)
    made = ready(LivingScene(fitting, observer=alone))
    assert titles(made) == [f"{side}: bev, norm", f"{side}: change of bev"]
    assert "cosine" not in made.report.value
    made.compare.value = "difference"
    assert titles(made) == [f"{side}: bev, norm"] and "no difference to draw" in made.canvas.status


def test_what_cannot_live(world: LiveWorld, observer: Observer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name a student's run"):
        LivingScene(world)
    with pytest.raises(FileNotFoundError, match="no data set at"):
        LivingScene(tmp_path / "none", observer=observer)


def test_found_score_and_nearest() -> None:
    box = Boxes3D.make(torch.tensor([[10.0, 2, 1, 4, 2, 1.5, 0, 0, 0]]), torch.tensor([0]))
    rows = torch.zeros(4, 9)
    rows[:, :2] = torch.tensor([[10.5, 2.5], [10.0, 2.0], [10.1, 2.0], [14.0, 2.0]])
    found = Detections(rows, torch.tensor([0, 1, 0, 0]), torch.tensor([0.4, 0.9, 0.6, 0.95]))
    assert math.isclose(found_score(found, box), 0.6, abs_tol=1e-6)
    assert math.isnan(found_score(found, replace(box, labels=torch.tensor([8]))))
    other = replace(box, values=box.values + torch.tensor([3.0, 0, 0, 8, 0, 0, 0, 0, 0]))
    both = Boxes3D(*(torch.cat((getattr(box, f.name), getattr(other, f.name))) for f in fields(Boxes3D)))
    assert nearest(both, 10.2, 2.0, 2.0) == 0
    assert nearest(both, 18.5, 2.0, 2.0) == 1  # far from the centre, within the footprint
    assert nearest(both, 10.0, 9.0, 2.0) is None


def test_changes_in_words() -> None:
    words = changes_in_words(
        Changes(
            moved={1: (1.0, -2.0, 0.0), 2: (1, 1, 1)},
            removed=frozenset({2}),
            beams=8,
            calibration={"CAM_FRONT_LEFT": (0.0, 1.5, 0.0)},
        ),
        {1: "car", 2: "bus"},
    )
    assert words == (
        "car #1 moved +1.0 m ahead, -2.0 m left; bus #2 removed; LiDAR beams 8; "
        "calibration of front left off by pitch +1.5°"
    )


def test_a_control_is_heard_while_another_thread_sets_some(scene: LivingScene) -> None:
    inside, done = threading.Event(), threading.Event()

    def draw() -> None:
        with scene._silent():
            inside.set()
            done.wait(0.2)

    thread = threading.Thread(target=draw)
    thread.start()
    assert inside.wait(10)
    scene.fog.value, scene.ahead.value = 0.4, 3.0
    thread.join()
    assert scene.changes.fog == 0.4 and scene.changes.moved == {scene.object.value: (3.0, 0.0, 0.0)}
    ready(scene)
    assert "fog 0.4" in scene.place.value
