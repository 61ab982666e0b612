"""Gradients at the shared map: right numbers, and a training that does not notice."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture
from torch import Tensor

from kdlab.checkpoint import RunFolder
from kdlab.config import DistillConfig, RunConfig
from kdlab.data.batch import Loader
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.gradients import COLUMNS, Gradients, gradient_products, read_gradients
from kdlab.models import build_detector
from kdlab.train import Training, train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("gradients") / "set")


@pytest.fixture(scope="module")
def config(root: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A distilled camera student that measures in every second step of six."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    teacher = train(mini_config(root, epochs=1), folder, progress=False, cpu=True)
    plain = mini_config(root, "camera", gradients_every=2, precision="bf16", ema=0.9)
    return replace(plain, distill=DistillConfig("unidistill", str(teacher)))


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config, tmp_path_factory.mktemp("run") / "run", progress=False, cpu=True)


def test_products_of_known_gradients() -> None:
    shared = torch.ones(2, 3, requires_grad=True)
    other = torch.ones(3, requires_grad=True)
    losses = {
        "kd/first": shared[0].sum() * 3,
        "heatmap": shared[0, 0] * 2,
        "depth": other.sum(),
        "box": shared[1].square().sum(),
        "kd/constant": torch.tensor(1.0),
        "kd/nothing": (shared * 0).sum(),
    }
    names, products = gradient_products(losses, shared)
    assert names == ["heatmap", "box", "detection", "kd/first"] and products.dtype == torch.float64
    assert products.tolist() == [[4, 0, 4, 6], [0, 12, 12, 0], [4, 12, 16, 6], [6, 0, 6, 27]]
    sum(losses.values()).backward()  # type: ignore[union-attr] - the graph is still there
    assert shared.grad is not None and other.grad is not None
    names, products = gradient_products({"depth": other.sum()}, shared)
    assert names == [] and products.shape == (0, 0)


def test_rows(tmp_path: Path) -> None:
    shared = torch.ones(2, requires_grad=True)
    measure = Gradients(tmp_path / "gradients.csv", 3, lambda: shared)
    for step in range(4):
        measure(step, {"box": shared[0] * 3, "kd/a": -2 * shared.sum(), "kd/none": 0 * shared[0]})
    table = read_gradients(tmp_path)
    assert tuple(table.columns) == COLUMNS and table.step.tolist() == [0] * 3 + [3] * 3
    assert list(zip(table["first"], table["second"], strict=True))[:3] == list(
        itertools.combinations(["box", "detection", "kd/a"], 2)
    )
    box = table[(table["first"] == "box") & (table.step == 3)].set_index("second")
    assert box.cosine["kd/a"] == pytest.approx(-1 / math.sqrt(2)) and box.cosine["detection"] == 1
    assert box.first_norm["kd/a"] == 3 and box.second_norm["kd/a"] == pytest.approx(math.sqrt(8))


def test_a_detectors_losses(root: Path) -> None:
    """Against one whole backward pass per loss."""
    config = mini_config(root, "camera")
    dataset = NuScenesDataset(root, None, "all", images=True, points=True)
    loader = Loader(dataset, image_size=(32, 64), augment=config.data.augment, batch_size=2, depth_stride=8)
    batch = next(loader.epoch(0))
    torch.manual_seed(0)
    training = Training(build_detector(config.detector), keep="bev")
    losses = training(batch)
    names, products = gradient_products(losses, training.take_shared())
    assert names == ["heatmap", "box", "detection"] and "depth" in losses
    gradients = []
    for wanted in ({"heatmap"}, {"box"}, {"heatmap", "box"}):
        again = training(batch)
        bev = training.take_shared()
        bev.retain_grad()
        torch.stack([again[name] for name in wanted]).sum().backward()
        assert bev.grad is not None
        gradients.append(bev.grad.double().flatten())
    expected = torch.stack([torch.stack([a @ b for b in gradients]) for a in gradients])
    torch.testing.assert_close(products, expected, rtol=1e-4, atol=1e-9)
    assert training._shared is None  # nothing holds the graph any more


def test_the_training_does_not_notice(config: RunConfig, run: Path, tmp_path: Path) -> None:
    off = replace(config, train=replace(config.train, gradients_every=0))
    plain = train(off, tmp_path / "run", progress=False, cpu=True)
    for name in ("detector.safetensors", "losses.csv"):
        assert (plain / name).read_bytes() == (run / name).read_bytes()
    assert read_gradients(plain).empty and not (plain / "gradients.csv").exists()
    table = read_gradients(run)
    terms = ["feature", "relation", "response_class", "response_regression"]
    names = ["heatmap", "box", "detection", *(f"kd/{term}" for term in terms)]
    pairs = list(itertools.combinations(names, 2))
    assert table.step.tolist() == [step for step in (0, 2, 4) for _ in pairs]
    assert list(zip(table["first"], table["second"], strict=True)) == pairs * 3
    assert table.cosine.abs().max() <= 1 + 1e-9 and (table[["first_norm", "second_norm"]] > 0).all(axis=None)


class Killed(Exception):  # noqa: N818
    """Stands for a kill: nothing is written any more."""


@pytest.mark.parametrize("minutes", [0.0, 60.0])
def test_kills_change_nothing(config: RunConfig, run: Path, tmp_path: Path, minutes: float) -> None:
    config = replace(config, train=replace(config.train, checkpoint_minutes=minutes))
    for at in (2, 4):

        def die(step: int, row: Mapping[str, float], at: int = at) -> None:
            if step == at:
                raise Killed

        with pytest.raises(Killed):
            train(config, tmp_path / "run", progress=False, cpu=True, on_step=die)
        with open(tmp_path / "run" / "gradients.csv", "a") as file:
            file.write(f"{at},heat")  # a row that was cut short
        assert read_gradients(tmp_path / "run").step.max() == at
    train(config, tmp_path / "run", progress=False, cpu=True)
    assert (tmp_path / "run" / "gradients.csv").read_bytes() == (run / "gradients.csv").read_bytes()


def test_switched_on_and_off_along_the_way(config: RunConfig, run: Path, tmp_path: Path) -> None:
    """The numbers of a run do not depend on it, so it may change when a run goes on; no step comes twice."""
    for every, at in ((2, 4), (0, 5), (1, None)):

        def die(step: int, row: Mapping[str, float], at: int | None = at) -> None:
            if step == at:
                raise Killed

        train_config = replace(config.train, gradients_every=every, checkpoint_minutes=0.0)
        try:
            train(replace(config, train=train_config), tmp_path / "run", progress=False, cpu=True, on_step=die)
        except Killed:
            assert at is not None
    assert read_gradients(tmp_path / "run").step.unique().tolist() == [0, 2, 4, 5]
    assert (tmp_path / "run" / "detector.safetensors").read_bytes() == (run / "detector.safetensors").read_bytes()


def test_at_the_images_all_losses_pull(root: Path, tmp_path: Path) -> None:
    """Depth supervision and terms of camera BEV maps lie before the BEV map, and behind the images' features."""
    teacher = train(mini_config(root, epochs=1), tmp_path / "teacher", progress=False, cpu=True)
    plain = mini_config(root, "camera", epochs=1, gradients_every=1, evaluate_every=1, ema=0.9)
    plain = replace(plain, distill=DistillConfig("labeldistill", str(teacher), stage_epochs=1))
    seen = {}
    for at in ("bev", "image"):
        config = replace(plain, train=replace(plain.train, gradients_at=at))
        found = read_gradients(train(config, tmp_path / at, progress=False, cpu=True))
        seen[at] = {*found["first"], *found["second"]}
    weights = [(tmp_path / at / "detector.safetensors").read_bytes() for at in seen]
    assert weights[0] == weights[1]  # measuring changes nothing
    assert seen["image"] - seen["bev"] == {"depth", "kd/label_0", "kd/lidar_0"} and seen["bev"] < seen["image"]
    lidar = mini_config(root, gradients_every=1, gradients_at="image")
    with pytest.raises(ValueError, match="gradients_at is image, and the detector has no cameras"):
        train(lidar, tmp_path / "lidar", progress=False, cpu=True)


def test_a_restart_forgets_them(config: RunConfig, root: Path, tmp_path: Path) -> None:
    small = mini_config(root, epochs=1, gradients_every=1)
    out = train(small, tmp_path / "run", progress=False, cpu=True)
    assert len(read_gradients(out)) == 9
    off = replace(small, train=replace(small.train, gradients_every=0))
    train(off, out, progress=False, cpu=True, resume=False)
    assert not RunFolder(out).gradients.exists()


def test_one_step_holds_no_second_graph() -> None:
    """The map is handed over once."""
    training = Training.__new__(Training)
    torch.nn.Module.__init__(training)
    kept: Tensor = torch.ones(1)
    training._shared = kept
    assert training.take_shared() is kept and training._shared is None
