"""The explorer, driven from Python as the page would: traits are set, and what the canvas was sent is read."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture

from kdlab.checkpoint import RunFolder, save_weights, write_json
from kdlab.config import to_dict
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.distill import METHODS
from kdlab.models import build_detector
from kdlab.sample import Sample
from kdlab.view import explorer as module
from kdlab.view.explorer import BEVExplorer
from kdlab.view.sight import Frames, Observer, load_sights, save_sights
from kdlab.view.widgets.album import Kept, Wanted


class Reel:
    """Samples one after another; some are broken, and all may be held back."""

    def __init__(self, sample: Sample, count: int = 4, broken: tuple[int, ...] = ()) -> None:
        self.sample, self.count, self.broken = sample, count, broken
        self.go = threading.Event()
        self.go.set()
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        assert self.go.wait(20)
        self.read.append(index)
        if index in self.broken:
            raise ValueError(f"samples/CAM_FRONT/{index}.jpg is damaged; copy it anew")
        points = self.sample.points + torch.tensor([float(index), 0, 0, 0, 0])
        return replace(self.sample, token=f"token-{index}", scene=f"scene-{index // 2}", points=points)


def observer_of(sides: str = "both", method: str = "unidistill") -> Observer:
    config = mini_config(Path("nowhere"), "camera")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = build_detector(config.detector).eval() if sides != "teacher" else None
        teacher = build_detector(mini_config(Path("nowhere")).detector).eval() if sides != "student" else None
    chosen = METHODS[method]("camera", "lidar", {}) if sides == "both" else None
    return Observer(teacher, student, chosen, config=config)


def ready(explorer: BEVExplorer) -> BEVExplorer:
    assert explorer.wait(60)
    return explorer


@pytest.fixture
def explorer(sample: Sample) -> Iterator[BEVExplorer]:
    made = ready(BEVExplorer(Frames(Reel(sample), observer_of())))
    yield made
    made.play.value = False
    assert made.wait(60)


def titles(explorer: BEVExplorer) -> list[str]:
    return [panel["title"] for panel in explorer.canvas.panels]


def values(explorer: BEVExplorer, place: int) -> np.ndarray:
    panel = explorer.canvas.panels[place]
    kind = np.uint8 if panel["kind"] == "rgb" else np.float16
    return np.frombuffer(panel["values"], kind).astype(np.float32) * panel["scale"]


def test_teacher_student_difference_and_loss_lie_side_by_side(explorer: BEVExplorer) -> None:
    canvas = explorer.canvas
    assert [t.partition(":")[0] for t in titles(explorer)] == ["teacher", "student", "student − teacher", "all terms"]
    assert canvas.extent == [-51.2, 51.2, -51.2, 51.2] and canvas.cells == [32, 32]
    assert all(panel["shape"] == [32, 32] for panel in canvas.panels)
    difference = values(explorer, 1) - values(explorer, 0)
    assert np.allclose(values(explorer, 2), difference, atol=0.01 * np.abs(difference).max())
    assert len(canvas.pictures) == 6 and set(canvas.boxes) == {"truth", "teacher", "student"} and canvas.points
    assert canvas.status == "" and not explorer.canvas.pixels
    for word in ("teacher <b>lidar</b>", "student <b>camera</b>", "method <b>unidistill</b>", "4 frames"):
        assert word in explorer.heading.value
    assert "scene-0" in explorer.place.value and "2 boxes" in explorer.place.value


def test_pickers_offer_what_there_is_and_redraw(explorer: BEVExplorer) -> None:
    sight = explorer.album.sights[0]
    assert {value for _, value in explorer.stage.options} >= {"bev", "stages[0]", "stages[1]", "neck", "lidar_bev"}
    assert [value for _, value in explorer.term.options] == ["all", *sight.results]
    before = explorer.canvas.panels
    explorer.stage.value = "stages[1]"
    assert titles(explorer)[0].startswith("teacher: stages[1]") and explorer.canvas.panels[3] == before[3]
    assert explorer.channel.max == 31 and explorer.channel.disabled
    explorer.view.value = "pca"
    assert [panel["kind"] for panel in explorer.canvas.panels] == ["rgb", "rgb", "float16", "float16"]
    explorer.view.value = "channel"
    assert not explorer.channel.disabled and titles(explorer)[0].endswith("channel 0")
    explorer.channel.value = 7
    assert titles(explorer)[1].endswith("channel 7")
    explorer.stage.value = "bev"  # has fewer channels than some: the slider stays within them
    assert explorer.channel.max == 7 and titles(explorer)[1].endswith("channel 7")
    explorer.term.value = "feature"
    assert titles(explorer)[3] == f"feature: {sight.value('feature'):.4g}"
    explorer.what.value = "gradient"
    assert explorer.wait(60) and "gradient" in titles(explorer)[3]
    assert np.allclose(values(explorer, 3), sight.gradient_map("feature").numpy().ravel(), rtol=2e-3, atol=1e-6)


def test_what_a_side_does_not_have_is_said(explorer: BEVExplorer) -> None:
    assert ("lidar_bev (teacher only)", "lidar_bev") in explorer.stage.options
    explorer.stage.value = "lidar_bev"
    assert [t.partition(":")[0] for t in titles(explorer)] == ["teacher", "all terms"]
    assert "the student has no lidar_bev" in explorer.canvas.status
    explorer.stage.value = "bev"
    assert explorer.canvas.status == "" and len(explorer.canvas.panels) == 4


def test_a_term_that_the_pair_cannot_have_says_why(sample: Sample) -> None:
    made = ready(BEVExplorer(Frames(Reel(sample, 1), observer_of(method="simdistill"))))
    lacking = [value for label, value in made.term.options if label.endswith("(not here)")]
    assert lacking
    made.term.value = lacking[0]
    assert lacking[0] in made.canvas.status and len(made.canvas.panels) >= 2


def test_a_click_tells_all_about_a_cell(explorer: BEVExplorer) -> None:
    canvas = explorer.canvas
    canvas.cell = [16, 19]
    assert [t.partition(":")[2].strip() for t in titles(explorer)[4:]] == ["cosine to the cell"] * 2
    assert values(explorer, 5).reshape(32, 32)[16, 19] == pytest.approx(1.0, abs=2e-3)
    assert canvas.pixels and all(0 <= camera < 6 and weight > 0 for camera, _, _, weight in canvas.pixels)
    html = explorer.report.value
    for word in ("Cell 16, 19", "11.2 m", "1.6 m", "cosine of the two", "LiDAR points", "camera", "car"):
        assert word in html, word
    ready(explorer)
    assert "…" not in explorer.report.value and canvas.status == ""
    assert set(explorer.album.sights[0].gradients) >= set(explorer.album.sights[0].results)
    explorer.show_similarity.value = False
    assert len(canvas.panels) == 4
    canvas.cell = []
    assert canvas.pixels == [] and "Click a cell" in explorer.report.value


def test_the_cell_stays_while_frames_change(explorer: BEVExplorer) -> None:
    explorer.canvas.cell = [3, 4]
    first = explorer.report.value
    explorer.frame.value = 2
    ready(explorer)
    assert explorer.canvas.cell == [3, 4] and "Cell 3, 4" in explorer.report.value != first


def test_thresholds_are_tied_in_the_page_and_toggles_reach_the_canvas(explorer: BEVExplorer) -> None:
    ends = [(link.source, link.target) for link in explorer._links]
    assert ends == [
        ((explorer.min_score, "value"), (explorer.canvas, "min_score")),
        ((explorer.mask_threshold, "value"), (explorer.canvas, "mask_threshold")),
    ]
    assert explorer.canvas.min_score == explorer.min_score.value
    serial = explorer.canvas.serial
    for name in ("boxes", "points", "mask", "cameras"):
        control = getattr(explorer, f"show_{name}")
        control.value = not control.value
        assert explorer.canvas.show[name] is control.value
    assert explorer.canvas.serial == serial  # nothing was sent anew


def test_masks_can_be_picked(explorer: BEVExplorer) -> None:
    names = [value for _, value in explorer.mask.options]
    assert {"foreground", "Gaussians"} <= set(names) and len(explorer.canvas.mask) == 32 * 32
    seen = set()
    for name in names:
        explorer.mask.value = name
        seen.add(explorer.canvas.mask)
    assert len(seen) > 1


def test_a_quirk_runs_the_terms_alone(explorer: BEVExplorer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = explorer.album.sights[0].value("feature")
    runs: list[Sample] = []
    see = Observer.see
    monkeypatch.setattr(Observer, "see", lambda self, sample: runs.append(sample) or see(self, sample))
    explorer.quirks["unidistill.transpose_points"].value = True
    explorer.term.value = "feature"
    ready(explorer)
    assert runs == [] and titles(explorer)[3] != f"feature: {before:.4g}"
    explorer.what.value = "gradient"
    ready(explorer)
    assert "gradient" in titles(explorer)[3] and explorer.canvas.status == ""
    explorer.quirks["unidistill.transpose_points"].value = False
    explorer.what.value = "loss"
    assert titles(explorer)[3] == f"feature: {before:.4g}"
    explorer.quirks["unidistill.teacher_train_mode"].value = True
    ready(explorer)
    assert runs and titles(explorer)[3] != f"feature: {before:.4g}"


def test_a_quirk_that_is_built_into_the_student_cannot_be_switched(sample: Sample) -> None:
    made = ready(BEVExplorer(Frames(Reel(sample, 1), observer_of(method="simdistill"))))
    assert made.quirks["simdistill.shared_lift"].disabled and not made.quirks["simdistill.double_sigmoid"].disabled


def test_keys_step_and_play(explorer: BEVExplorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACE", 0.01)
    explorer.canvas.key = "]:1"
    assert explorer.frame.value == 1
    for number, (key, frame) in enumerate([("[", 0), ("pageup", 3), ("pagedown", 0), ("q", 0)], 2):
        explorer.canvas.key = f"{key}:{number}"
        assert explorer.frame.value == frame
    explorer.back.click()
    explorer.forward.click()
    assert explorer.frame.value == 0
    seen: list[int] = []
    explorer.frame.observe(lambda change: seen.append(change["new"]), "value")
    explorer.canvas.key = "space:9"
    assert explorer.play.value and explorer.play.icon == "pause"
    until = time.monotonic() + 30
    while len(seen) < 6 and time.monotonic() < until:
        time.sleep(0.01)
    explorer.canvas.key = "space:10"
    ready(explorer)
    assert not explorer.play.value and seen[:6] == [1, 2, 3, 0, 1, 2]


def test_playing_stops_where_no_page_shows_it(explorer: BEVExplorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACE", 0.01)
    explorer.play.value = True
    ready(explorer)  # a cell that is run again leaves no thread behind
    assert not explorer.play.value and explorer.canvas.serial > module.UNSEEN


def test_a_known_frame_is_drawn_at_once_and_the_next_one_is_foreseen(sample: Sample) -> None:
    reel = Reel(sample)
    made = ready(BEVExplorer(Frames(reel, observer_of())))
    assert reel.read == [0, 1, 3]  # the neighbours
    reel.go.clear()
    made.frame.value = 1
    assert made.album.sights.ready(1) and made._shown == Wanted(1, mask="foreground")
    serial = made.canvas.serial
    made.frame.value = 2  # is not there, and held back
    assert made.canvas.serial == serial and made._background.busy
    assert made.canvas.status == "frame 2: running the networks …"
    reel.go.set()
    ready(made)
    assert made.canvas.status == "" and made._shown is not None and made._shown.index == 2


def test_only_the_newest_request_is_drawn(sample: Sample) -> None:
    reel = Reel(sample, 8)
    made = ready(BEVExplorer(Frames(reel, observer_of())))
    drawn: list[int] = []
    made.canvas.observe(lambda _: drawn.append(made.frame.value), "points")
    reel.go.clear()
    for index in (3, 4, 5):
        made.frame.value = index
        time.sleep(0.02)
    reel.go.set()
    ready(made)
    assert drawn == [5] and 4 not in reel.read[:-2]


def test_a_broken_frame_says_so_and_the_others_go_on(sample: Sample) -> None:
    made = ready(BEVExplorer(Frames(Reel(sample, 4, broken=(1,)), observer_of())))
    assert made.canvas.status == "" and len(made.canvas.panels) == 4  # its neighbour is fine
    made.frame.value = 1
    ready(made)
    assert made.canvas.status == "Frame 1 cannot be shown. samples/CAM_FRONT/1.jpg is damaged; copy it anew"
    assert made.canvas.panels == [] and made.canvas.pictures == []
    made.frame.value = 2
    ready(made)
    assert made.canvas.status == "" and len(made.canvas.panels) == 4


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_one_side_alone(sample: Sample, side: str) -> None:
    made = ready(BEVExplorer(Frames(Reel(sample, 2), observer_of(side))))
    assert len(titles(made)) == 1 and titles(made)[0].startswith(f"{side}: bev")
    assert list(made.term.options) == [("none", "")] and made.quirks == {}
    made.what.value = "gradient"
    made.view.value = "pca"
    made.canvas.cell = [10, 10]
    ready(made)
    assert len(titles(made)) == 2 and made.canvas.status == ""
    assert "norm of the " + side in made.report.value and "Terms" not in made.report.value
    assert "method <b>none</b>" in made.heading.value


def test_features_from_a_file(sample: Sample, tmp_path: Path) -> None:
    save_sights(tmp_path / "sights.safetensors", Frames(Reel(sample, 2), observer_of())[:])
    made = ready(BEVExplorer(load_sights(tmp_path / "sights.safetensors")))
    assert len(titles(made)) == 4 and made.quirks == {}
    for word in ("2 stored frames", "student <b>stored</b>", "method <b>4 stored terms</b>"):
        assert word in made.heading.value
    assert len(BEVExplorer(tmp_path / "sights.safetensors").album) == 2
    made.frame.value = 1
    made.canvas.cell = [16, 20]
    made.what.value = "gradient"
    ready(made)
    assert made.canvas.status == "" and "gradient" in titles(made)[3] and "…" not in made.report.value


def test_a_folder_and_runs(tmp_path: Path, mini: Callable[..., Any]) -> None:
    root, teacher, student = mini(tmp_path)
    made = ready(BEVExplorer(root, teacher, student, "unidistill", split="all"))
    assert len(made.album) == 6 and len(titles(made)) == 4
    for word in ("teacher <b>lidar</b>", "student <b>pupil, camera</b>", "all"):
        assert word in made.heading.value
    with_data = BEVExplorer(NuScenesDataset(root, split="tiny_val"), student=student)
    assert len(ready(with_data).album) == 3 and len(titles(with_data)) == 1
    assert len(BEVExplorer(root, student=student).album) == 3  # the run's validation split


@pytest.fixture
def mini() -> Callable[..., Any]:
    def make(folder: Path) -> tuple[Path, Path, Path]:
        root = write_set(folder / "set")
        for name, modality in (("lidar", "lidar"), ("pupil", "camera")):
            config = mini_config(root, modality)  # type: ignore[arg-type]
            run = RunFolder(folder / name)
            run.path.mkdir()
            write_json(run.config, to_dict(config))
            save_weights(run.weights, build_detector(config.detector))
        return root, folder / "lidar", folder / "pupil"

    return make


def test_what_cannot_be_explored_is_refused(sample: Sample, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name a student's run, a teacher's, or both"):
        BEVExplorer(tmp_path)
    with pytest.raises(ValueError, match="hold networks and method already"):
        BEVExplorer(Frames(Reel(sample, 1), observer_of("student")), student="runs/student")
    for nothing in ([], 3):
        with pytest.raises(ValueError, match="no sights"):
            BEVExplorer(nothing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs sights, got Sample"):
        BEVExplorer([sample])  # type: ignore[list-item]
    with pytest.raises(FileNotFoundError, match=r"there is no .*none\.safetensors"):
        BEVExplorer(tmp_path / "none.safetensors")


def test_an_empty_split_is_told(tmp_path: Path, mini: Callable[..., Any]) -> None:
    root, _, student = mini(tmp_path)
    splits = root / "v1.0-tiny" / "splits.json"
    names = json.loads(splits.read_text())
    splits.write_text(json.dumps({**names, "tiny_val": []}))
    with pytest.raises(ValueError, match=r"split tiny_val of .* is empty; give split= one of all"):
        BEVExplorer(root, student=student)


def test_an_explorer_shows_itself(explorer: BEVExplorer) -> None:
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()


def test_the_last_results_are_kept() -> None:
    kept, made = Kept(2), []

    def make(key: int) -> int:
        made.append(key)
        return key

    for key in (1, 2, 1, 3, 1, 2):
        assert kept.get(key, lambda key=key: make(key)) == key  # type: ignore[misc]
    assert made == [1, 2, 3, 2]
