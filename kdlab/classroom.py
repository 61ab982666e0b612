"""What the notebooks share: a small part of the demo's world, made once, and the networks that are shipped for it.

Also a pretended detector, whose boxes are good enough to show a planted bug.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kdlab.data.nuscenes import NuScenesDataset
from kdlab.data.simulate import simulate
from kdlab.demo import SPLIT, WORLD, richest
from kdlab.evaluate import Found
from kdlab.sample import Detections, Sample
from kdlab.shipping import WEIGHTS, weights_of, world_of

if TYPE_CHECKING:
    from kdlab.view.sight import Frames, Observer

SCENES = ("scene-0018", "scene-0022", "scene-0023", "scene-0028")
"""Scenes of the demo's world in the room: two of sim_train, one of sim_val, one of sim_test; the busiest of each."""

FAST_SCENES = ("scene-0022", "scene-0028")
"""In fast mode: one of sim_train, one of sim_test."""

SWEEPS = 2
"""LiDAR sweeps that the shipped networks see."""


@dataclass(frozen=True)
class Room:
    """A small world and the networks trained on the whole of it.

    Attributes:
        world: data set with a few scenes of `kdlab.demo.WORLD`.
        out: folder for runs.
        fast: a test of seconds: one scene less of each kind, a few steps of training.
    """

    world: Path
    out: Path
    fast: bool

    def weights(self, name: str) -> Path:
        """Folder of a shipped network: lidar, fusion, camera, unidistill, distillbev, simdistill or labeldistill.

        Raises:
            FileNotFoundError: none of that name is shipped for this world.
        """
        folder = weights_of(name, world_of(self.world))
        if not folder.is_dir():
            shipped = sorted(p.name.rpartition("-")[0] for p in folder.parent.glob(f"*-{WORLD.digest()}"))
            known = f"there are {', '.join(shipped)}" if shipped else "`make weights` makes them anew"
            raise FileNotFoundError(f"no network {name!r} is shipped for this world; {known}")
        return folder

    def data(self, split: str = SPLIT, frames: int = 1, sweeps: int = SWEEPS) -> NuScenesDataset:
        """Samples of a split as the shipped networks see them.

        Args:
            split: sim_train, sim_val (empty in fast mode) or sim_test.
            frames: key frame and past ones.
            sweeps: LiDAR sweeps in a cloud.
        """
        return NuScenesDataset(self.world, split=split, frames=frames, sweeps=sweeps)

    @cached_property
    def richest(self) -> int:
        """Index of the test sample with most boxes nearby."""
        return richest(self.world)

    def sample(self, index: int | None = None) -> Sample:
        """A test sample; the richest where no index is given."""
        return self.data()[self.richest if index is None else index]

    def frames(self, observer: Observer, split: str = SPLIT) -> Frames:
        """The samples of a split as an observer sees them, each computed when first asked for."""
        from kdlab.view.sight import Frames

        return Frames(self.data(split), observer)

    def steps(self, full: int, fast: int = 2) -> int:
        """Length of a training: ``fast`` in fast mode, else ``full``."""
        return fast if self.fast else full


def open_room(out: Path | str | None = None) -> Room:
    """The world and the networks of the notebooks; the world is simulated by the first call and reused by all others.

    The environment variables KDLAB_OUT (the folder) and KDLAB_FAST (fast mode where it is set) are for tests.

    Args:
        out: folder for the world and the runs; KDLAB_OUT or the checkout's runs/ where left out.

    Raises:
        ValueError: the folder holds another part of the world.
        OSError: the folder cannot be written to.
        RuntimeError: called while a script is imported by the simulator's processes.
    """
    folder = Path(out or os.environ.get("KDLAB_OUT") or os.path.relpath(WEIGHTS.parents[1] / "runs"))
    fast = bool(os.environ.get("KDLAB_FAST"))
    folder.mkdir(parents=True, exist_ok=True)
    world = folder / ("room-fast" if fast else "room")
    with _alone(folder / f".{world.name}.lock"):
        simulate(world, WORLD, progress=not fast, only=FAST_SCENES if fast else SCENES)
    return Room(world, folder, fast)


def almost_truth(samples: Iterable[Sample], seed: int = 0) -> list[Found]:
    """What a good detector might find: the true boxes with noise, one in ten missed, and some that are not there.

    Errors have a standard deviation of 0.25 m in the plane, 6 % of each side, 0.1 rad of heading, and 15 % and 0.05 m/s
    of velocity. No network is behind it. A box that is farther off gets a lower score, one that is not there a low one.

    Args:
        samples: with annotations.
        seed: of the noise.
    """
    random = torch.Generator().manual_seed(seed)
    return [Found(s.token, _almost(s.boxes.values, s.boxes.labels, random), s.global_from_key) for s in samples]


def _almost(truth: torch.Tensor, labels: torch.Tensor, random: torch.Generator) -> Detections:
    """The boxes of one sample, best first."""
    noise = torch.randn(truth.shape, generator=random)
    apart = torch.randn(truth.shape, generator=random)
    values = truth.nan_to_num() * (torch.tensor([0, 0, 0, 0.06, 0.06, 0.06, 0, 0.15, 0.15]) * noise).exp()
    values += apart * torch.tensor([0.25, 0.25, 0.1, 0, 0, 0, 0.1, 0.05, 0.05])
    scores = 0.9 - 0.12 * apart[:, :2].norm(dim=-1)
    seen = torch.rand(len(truth), generator=random) > 0.1
    wrong = torch.rand(len(truth), generator=random) < 0.2
    ghosts = values[wrong] + torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0, 0]) * 12 * torch.randn(
        (int(wrong.sum()), 9), generator=random
    )
    low = 0.1 + 0.4 * torch.rand(len(ghosts), generator=random)
    score = torch.cat((scores[seen], low)).clamp(0.05, 1.0)
    best = score.argsort(descending=True)
    return Detections(
        torch.cat((values[seen], ghosts))[best], torch.cat((labels[seen], labels[wrong]))[best], score[best]
    )


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process is inside; the system lets go of the lock when a process dies.

    The simulator's processes import the script that started them: one that opened the room there would wait for itself.
    """
    child = multiprocessing.parent_process() is not None
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (fcntl.LOCK_NB if child else 0))
        except BlockingIOError as error:
            raise RuntimeError("open_room in a script goes below `if __name__ == '__main__':`") from error
        yield
