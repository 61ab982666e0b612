"""Stored features: equal to what the teacher makes, shared by the right runs alone, safe to kill, share and damage."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture

import kdlab.cache
from kdlab.cache import FeatureCache, Side, sides
from kdlab.checkpoint import load_detector
from kdlab.config import AugmentConfig, DistillConfig, RunConfig
from kdlab.data.batch import Loader
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.distill import Distiller, TensorPath, build_method
from kdlab.distill.labeldistill import build_encoder
from kdlab.losslog import read_losses
from kdlab.models import Detector, build_detector
from kdlab.sample import Batch, Features, Predictions
from kdlab.train import Training, train

CPU = torch.device("cpu")
TOLERANCE = {"rtol": 2**-11, "atol": 2**-25}
METHODS = {"unidistill": "lidar", "distillbev": "lidar", "labeldistill": "lidar", "simdistill": "fusion"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("cache") / "set")


@pytest.fixture(scope="module")
def teachers(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return {
        m: train(mini_config(root, m, epochs=1), folder / m, progress=False, cpu=True)  # type: ignore[arg-type]
        for m in ("lidar", "fusion")
    }


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sides whose networks ran."""
    ran: list[str] = []
    real = Distiller.run

    def run(self: Distiller, side: str, batch: Batch) -> Features:
        ran.append(side)
        return real(self, side, batch)

    monkeypatch.setattr(Distiller, "run", run)
    return ran


def distilled(root: Path, teacher: Path, cache: Path | str = "", method: str = "unidistill", **more: Any) -> RunConfig:
    config = mini_config(root, "camera", epochs=3)
    if method == "simdistill":
        camera = replace(config.detector.camera, simulated_lidar=True)
        config = replace(config, detector=replace(config.detector, camera=camera))
    given = DistillConfig(method, str(teacher), scale=0.01, stage_epochs=1, cache=str(cache))
    return replace(config, data=replace(config.data, draws=2), distill=replace(given, **more))


def quiet(config: RunConfig, out: Path, **options: Any) -> Path:
    return train(config, out, progress=False, cpu=True, **options)


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


def test_draws_come_again(root: Path) -> None:
    loader = Loader(
        NuScenesDataset(root, split="all"), image_size=(32, 64), batch_size=4, augment=AugmentConfig(), draws=2
    )
    first, second, third = (next(loader.epoch(e)) for e in range(3))
    assert (first.draws, second.draws, third.draws) == ([0] * 4, [1] * 4, [0] * 4)
    assert torch.equal(first.images, third.images) and torch.equal(first.points, third.points)
    assert not torch.equal(first.images, second.images) and not torch.equal(first.points, second.points)


def test_what_the_epochs_show(root: Path) -> None:
    def loader(**options: Any) -> Loader:
        dataset = NuScenesDataset(root, split="all", images=False, points=False)
        return Loader(dataset, image_size=(32, 64), shuffle=True, drop_last=True, **options)

    few = loader(batch_size=4, draws=2, seed=3)
    assert isinstance(few.dataset, NuScenesDataset)
    batches = [b for e in range(3) for b in few.epoch(e)]
    seen = {(few.dataset.tokens.index(t), d) for b in batches for t, d in zip(b.tokens, b.draws, strict=True)}
    assert set(few.shown(3)) == seen and len(few.shown(3)) == len(seen) < 12
    assert len(loader(batch_size=2, draws=2).shown(9)) == 12 and len(loader(batch_size=2).shown(9)) == 54


def test_a_plain_run_takes_draws(root: Path, tmp_path: Path) -> None:
    config = mini_config(root)
    config = replace(config, data=replace(config.data, draws=1))
    losses = [r["total"] for r in read_losses(quiet(config, tmp_path / "one") / "losses.csv")]
    other = [r["total"] for r in read_losses(quiet(mini_config(root), tmp_path / "new") / "losses.csv")]
    assert losses[:3] == other[:3] and losses[3:] != other[3:]


@pytest.mark.parametrize("method", METHODS)
def test_a_cached_run_equals_an_online_one(
    root: Path, teachers: dict[str, Path], tmp_path: Path, calls: list[str], method: str
) -> None:
    config = distilled(root, teachers[METHODS[method]], tmp_path / "cache", method)
    config = replace(config, data=replace(config.data, draws=1), train=replace(config.train, epochs=2))
    online = quiet(replace(config, distill=replace(config.distill, cache="")), tmp_path / "online")
    calls.clear()
    first = quiet(config, tmp_path / "first")
    networks = 2 if method == "labeldistill" else 1
    assert len(calls) == networks * (1 + 3)  # one to measure, then every step of an epoch
    assert len(files(tmp_path / "cache")) == networks * 6
    calls.clear()
    second = quiet(config, tmp_path / "second")
    assert not calls
    assert (first / "losses.csv").read_bytes() == (second / "losses.csv").read_bytes()
    assert (first / "detector.safetensors").read_bytes() == (second / "detector.safetensors").read_bytes()
    one, two = read_losses(online / "losses.csv")[0], read_losses(second / "losses.csv")[0]
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-6), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("modality", ["lidar", "fusion"])
def test_stored_features_are_the_teachers(
    root: Path, teachers: dict[str, Path], tmp_path: Path, modality: str, precision: str
) -> None:
    config, distiller, batch = material(root, teachers[modality], modality, tmp_path)
    found = sides(config, distiller, "data", CPU)
    cache = FeatureCache(tmp_path / "cache", found)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        made = {side: distiller.run(side, batch) for side in ("teacher", "labels")}
        cache.fill(batch, distiller.run)
    again = cache.read(batch.tokens, batch.draws)
    assert {path.partition(".")[0] for path in again} == {"teacher", "labels"}
    types = set()
    for path, value in again.items():
        parsed = TensorPath.parse(path)
        expected = parsed.read(made[parsed.side])
        assert isinstance(expected, torch.Tensor) and value.shape == expected.shape
        assert torch.equal(batch.stored[path], value)
        types.add(expected.dtype)
        halved = expected.dtype == torch.float32 and parsed.part != "heatmap"
        assert value.dtype == (torch.float16 if halved else expected.dtype)
        torch.testing.assert_close(value.float(), expected.float(), **TOLERANCE)
    assert types == ({torch.float32} if precision == "fp32" else {torch.float32, torch.bfloat16})


def material(root: Path, teacher: Path, modality: str, folder: Path) -> tuple[RunConfig, Distiller, Batch]:
    """LabelDistill with a teacher and an encoder that is not trained, and a batch."""
    config = distilled(root, teacher, folder / "cache", "labeldistill")
    assert config.distill is not None
    method = build_method(config.distill, "camera", modality)  # type: ignore[arg-type]
    torch.manual_seed(0)
    student, network = build_detector(config.detector), load_detector(teacher)
    distiller = Distiller(method, student, network, build_encoder(network, method.on), grid=student.grid)
    loader = Loader(
        NuScenesDataset(root, split="all", sweeps=2), image_size=(32, 64), batch_size=4, augment=AugmentConfig()
    )
    return config, distiller, next(loader.epoch(0))


def test_whole_predictions_and_great_values(tmp_path: Path, teachers: dict[str, Path], root: Path) -> None:
    _, distiller, batch = material(root, teachers["lidar"], "lidar", tmp_path)
    made = distiller.run("teacher", batch)
    assert made.predictions is not None
    made.bev[1] += 1e5
    parts = {f"teacher.predictions.{p}": f"predictions.{p}" for p in ("heatmap", "regression")}
    cache = FeatureCache(tmp_path / "cache", [Side("teacher", {"teacher.bev": "bev", **parts}, {})])
    cache.fill(batch, lambda side, batch: made)
    torch.testing.assert_close(batch.stored["teacher.bev"], made.bev, **TOLERANCE)
    joined = Predictions.of_maps(*(batch.stored[path] for path in parts))
    torch.testing.assert_close(joined.tasks[3].vel.float(), made.predictions.tasks[3].vel, **TOLERANCE)
    torch.testing.assert_close(joined.regression.float(), made.predictions.regression, **TOLERANCE)


def test_a_full_cache_spares_the_teachers_sensors(
    root: Path, teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = distilled(root, teachers["lidar"], tmp_path / "cache")
    camera = replace(config.detector.camera, depth_supervision=False)
    config = replace(config, detector=replace(config.detector, camera=camera))
    seen: list[int] = []
    real = Training.forward

    def look(self: Training, batch: Batch) -> dict[str, torch.Tensor]:
        seen.append(len(batch.points))
        return real(self, batch)

    monkeypatch.setattr(Training, "forward", look)
    train(config, tmp_path / "first", cpu=True)
    assert min(seen) > 0
    first = capsys.readouterr().out
    assert "0 of 12 entries are there; in all they take" in first and "still to be written" in first
    seen.clear()
    workers = replace(config, data=replace(config.data, workers=1))
    train(workers, tmp_path / "second", cpu=True)
    assert set(seen) == {0}
    assert "12 of 12 entries are there; the teacher is not run" in capsys.readouterr().out
    one, two = ((tmp_path / name / "detector.safetensors").read_bytes() for name in ("first", "second"))
    assert one == two


class Killed(Exception):  # noqa: N818
    """Stands for a kill."""


@pytest.mark.parametrize("minutes", [0.0, 60.0])
def test_kills_change_nothing(root: Path, teachers: dict[str, Path], tmp_path: Path, minutes: float) -> None:
    whole = quiet(distilled(root, teachers["lidar"], tmp_path / "a"), tmp_path / "whole")
    config = distilled(root, teachers["lidar"], tmp_path / "b")
    config = replace(config, train=replace(config.train, checkpoint_minutes=minutes))
    for at in (1, 4, 7):

        def die(step: int, row: Mapping[str, float], at: int = at) -> None:
            if step == at:
                raise Killed

        with pytest.raises(Killed):
            quiet(config, tmp_path / "killed", on_step=die)
    moved = shutil.move(tmp_path / "b", tmp_path / "c")  # a moved cache is not another run
    quiet(replace(config, distill=replace(config.distill, cache=str(moved))), tmp_path / "killed")
    for name in ("detector.safetensors", "losses.csv"):
        assert (whole / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


@pytest.fixture
def one_side(root: Path, teachers: dict[str, Path], tmp_path: Path) -> Iterator[tuple[FeatureCache, Batch, list[str]]]:
    """A cache of the teacher alone, a batch, and who ran."""
    batch = material(root, teachers["lidar"], "lidar", tmp_path)[2]
    cache = FeatureCache(tmp_path / "cache", [Side("teacher", {"teacher.bev": "bev"}, {})])
    yield cache, batch, []


def fill(cache: FeatureCache, batch: Batch, ran: list[str], value: float = 1.0) -> torch.Tensor:
    def run(side: str, batch: Batch) -> Features:
        ran.append(side)
        maps = torch.full((batch.size, 2, 3, 4), value)
        return Features(bev=maps, neck=maps + 1)

    batch.stored = {}
    return cache.fill(batch, run).stored["teacher.bev"]


@pytest.mark.parametrize("damage", ["cut", "bits", "empty", "text", "gone"])
def test_damaged_entries_are_made_again(one_side: tuple[FeatureCache, Batch, list[str]], damage: str) -> None:
    cache, batch, ran = one_side
    fill(cache, batch, ran)
    entry = files(cache.folder)[1]
    data = entry.read_bytes()
    changed = {"cut": data[:-7], "bits": data[:-9] + b"x" + data[-8:], "empty": b"", "text": b"nothing"}
    entry.unlink() if damage == "gone" else entry.write_bytes(changed[damage])
    keys = list(zip(batch.tokens, batch.draws, strict=True))
    assert cache.missing(keys) == (0 if damage == "bits" else 1)
    with pytest.raises(ValueError, match="gone or damaged; run the same command again"):
        cache.read(batch.tokens, batch.draws)
    assert cache.missing(keys) == 1
    again = fill(cache, batch, ran, 1.0)
    assert ran == ["teacher"] * 2 and torch.equal(again, torch.ones(4, 2, 3, 4).half())
    assert entry.read_bytes() == data and cache.missing(keys) == 0


def test_a_tensor_more_is_added(one_side: tuple[FeatureCache, Batch, list[str]]) -> None:
    cache, batch, ran = one_side
    fill(cache, batch, ran)
    wider = FeatureCache(cache.folder, [replace(cache.sides[0], paths={"teacher.bev": "bev", "teacher.neck": "neck"})])
    assert wider.missing([(batch.tokens[0], 0)]) == 1
    assert torch.equal(fill(wider, batch, ran, 5.0), torch.ones(4, 2, 3, 4).half())  # what is there stays
    assert float(batch.stored["teacher.neck"].mean()) == 6 and ran == ["teacher"] * 2
    assert torch.equal(fill(cache, batch, ran), torch.ones(4, 2, 3, 4).half()) and len(ran) == 2


def test_a_disk_that_fills_up(
    one_side: tuple[FeatureCache, Batch, list[str]], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    cache, batch, ran = one_side
    keys = [(token, 0) for token in batch.tokens]
    monkeypatch.setattr(kdlab.cache, "RESERVE", 2**80)
    with pytest.raises(
        ValueError, match=r"0 of 4 entries are there; in all they take 4\.0 MB, .* but only .* are free"
    ):
        cache.prepare(keys, lambda: {"teacher": 10**6})
    for _ in range(2):
        assert torch.equal(fill(cache, batch, ran), torch.ones(4, 2, 3, 4).half())
    assert len(ran) == 2 and not files(cache.folder) and len(caplog.records) == 1
    assert "not written to any more (its disk has less than" in caplog.text


def test_room_is_counted_by_network(one_side: tuple[FeatureCache, Batch, list[str]]) -> None:
    cache, batch, ran = one_side
    fill(cache, batch, ran)
    keys = [(token, 0) for token in batch.tokens]
    both = FeatureCache(cache.folder, [*cache.sides, Side("labels", {"labels.neck": "neck"}, {})])
    complete, text = both.prepare(keys, lambda: {"teacher": 10**6, "labels": 10**3})
    assert not complete and "4 of 8 entries are there; in all they take 4.0 MB, 0.0 MB of it still" in text


def test_a_full_cache_reserves_no_room_for_images(
    root: Path, teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = distilled(root, teachers["fusion"], tmp_path / "cache")
    config = replace(config, detector=mini_config(root, "lidar").detector)
    config = replace(config, data=replace(config.data, image_cache=str(tmp_path / "images")))
    opened: list[bool] = []
    real = NuScenesDataset.prepare

    def prepare(self: NuScenesDataset, reduce: int) -> str:
        opened.append(self._cache is not None)
        return real(self, reduce)

    monkeypatch.setattr(NuScenesDataset, "prepare", prepare)
    quiet(config, tmp_path / "first")
    assert opened == [False, True]
    opened.clear()
    quiet(config, tmp_path / "second")
    assert opened == [False, False]


def test_a_folder_that_cannot_be_written(one_side: tuple[FeatureCache, Batch, list[str]], tmp_path: Path) -> None:
    cache, batch, _ = one_side
    (tmp_path / "file").write_text("")
    other = FeatureCache(tmp_path / "file", cache.sides)
    with pytest.raises(ValueError, match=r"the rest cannot be written .*; name another folder"):
        other.prepare([(token, 0) for token in batch.tokens], lambda: {"teacher": 1})


def test_half_written_files_are_swept(one_side: tuple[FeatureCache, Batch, list[str]], monkeypatch: Any) -> None:
    cache, batch, ran = one_side
    fill(cache, batch, ran)
    part = files(cache.folder)[0].with_suffix(".0.part")
    part.write_text("")
    cache.prepare([("other", 0)], lambda: {"teacher": 1})
    assert part.exists()
    monkeypatch.setattr(kdlab.cache, "STALE", -60)
    cache.prepare([("other", 0)], lambda: {"teacher": 1})
    assert not part.exists()


def test_what_makes_entries_others(
    root: Path, teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    material_of = {m: material(root, teachers[m], m, tmp_path) for m in ("lidar", "fusion")}

    def folders(modality: str, changed: RunConfig | None = None, data: str = "data") -> tuple[str, str]:
        config, distiller, _ = material_of[modality]
        teacher, labels = sides(changed or config, distiller, data, CPU)
        return teacher.folder, labels.folder

    config = material_of["lidar"][0]
    data, augment = config.data, config.data.augment
    for modality in ("lidar", "fusion"):
        for changed in (
            replace(config, train=replace(config.train, seed=1)),
            replace(config, train=replace(config.train, precision="bf16")),
            replace(config, data=replace(data, augment=replace(augment, bev_rotate=1.0))),
        ):
            assert not set(folders(modality, changed)) & set(folders(modality))
        assert not set(folders(modality, data="other")) & set(folders(modality))
        for changed in (
            replace(config, data=replace(data, augment=replace(augment, image_rotate=1.0))),
            replace(config, data=replace(data, images="exact")),
        ):
            teacher, labels = folders(modality, changed)
            assert (teacher == folders(modality)[0]) == (modality == "lidar") and labels == folders(modality)[1]
        for changed in (
            replace(config, train=replace(config.train, epochs=9, lr=1.0, batch_size=3)),
            replace(config, data=replace(data, draws=7, workers=3, root="elsewhere")),
        ):
            assert folders(modality, changed) == folders(modality)
    assert folders("lidar") != folders("fusion")
    teacher = material_of["lidar"][1].teacher
    assert isinstance(teacher, Detector)
    before = folders("lidar")
    monkeypatch.setattr(kdlab.cache, "code_digest", lambda: "other")
    assert not set(folders("lidar")) & set(before)
    monkeypatch.undo()
    assert folders("lidar") == before
    with torch.no_grad():
        next(teacher.parameters())[0] += 1e-3
    assert folders("lidar")[0] != before[0] and folders("lidar")[1] == before[1]


def test_methods_share_a_folder(root: Path, teachers: dict[str, Path], tmp_path: Path, calls: list[str]) -> None:
    quiet(distilled(root, teachers["lidar"], tmp_path / "cache", "distillbev"), tmp_path / "one")
    entries, calls[:] = files(tmp_path / "cache"), []
    heads = distilled(root, teachers["lidar"], tmp_path / "cache", only=("response_class",))
    quiet(heads, tmp_path / "two")  # its one tensor is there already
    assert not calls and files(tmp_path / "cache") == entries


def test_errors(root: Path, teachers: dict[str, Path], tmp_path: Path) -> None:
    config = distilled(root, teachers["lidar"], tmp_path / "cache")
    with pytest.raises(ValueError, match=r"data\.draws is 0: every epoch shows new ones; give a number of versions"):
        quiet(replace(config, data=replace(config.data, draws=0)), tmp_path / "run")
    released = replace(config.distill, variant="released")
    with pytest.raises(
        ValueError, match=r"cannot keep features of unidistill: .*quirks on: unidistill\.teacher_train_"
    ):
        quiet(replace(config, distill=released), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="draws"):
        quiet(replace(config, data=replace(config.data, draws=-1)), tmp_path / "run")
