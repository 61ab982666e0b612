from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from mini_run import one_thread  # noqa: F401
from sight_fakes import observer_of, sight_of

from kdlab.geometry import BEVGrid
from kdlab.sample import Sample
from kdlab.view.sight.data import Sight
from kdlab.view.sight.frames import Frames, _size


class Looks:
    """Counts how often each sample is seen."""

    def __init__(self, grid: BEVGrid) -> None:
        self.grid, self.seen, self.wait = grid, [], 0.0

    def see(self, sample: Sample) -> Sight:
        self.seen.append(sample.token)
        return sight_of(sample, self.grid, live=object(), again=lambda: pytest.fail("seen again"))


def samples_of(sampler: Callable[..., Sample], count: int) -> list[Sample]:
    return [replace(sampler(), token=str(i), scene=f"scene-{i // 3}") for i in range(count)]


def test_frames_are_computed_once_and_the_oldest_go(sampler: Callable[..., Sample], grid: BEVGrid) -> None:
    looks = Looks(grid)
    frames = Frames(samples_of(sampler, 6), looks, keep=4)  # type: ignore[arg-type]
    assert len(frames) == 6 and not frames.ready(0) and frames.scene(-1) == "scene-1"
    first = frames[0]
    assert frames[0] is first and frames[-6] is first and looks.seen == ["0"] and frames.ready(0)
    found = {index: frames[index] for index in (1, 2, 3, 0, 4)}
    assert [frames.ready(i) for i in range(6)] == [True, False, True, True, True, False]
    assert [found[i].live is not None for i in range(5)] == [False, False, False, True, True]  # the last to be made
    assert [s.sample.token for s in frames[2:4]] == ["2", "3"]
    with pytest.raises(IndexError, match="frame 6 of 6"):
        frames[6]
    assert [s.sample.token for s in frames] == list("012345")


def test_graphs_that_are_made_again_do_not_pile_up(sampler: Callable[..., Sample]) -> None:
    frames = Frames(samples_of(sampler, 5), observer_of("unidistill"))
    maps = [sight.gradient_map("feature") for sight in frames]
    assert all(sight.gradient_map("relation").shape == found.shape for sight, found in zip(frames, maps, strict=True))
    assert sum(sight.live is not None for sight in frames) <= 3


def test_all_frames_together_stay_within_memory(
    sampler: Callable[..., Sample], grid: BEVGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Frames(samples_of(sampler, 1), Looks(grid))  # type: ignore[arg-type]
    size = _size(one[0])
    images, points = one[0].sample.images, one[0].sample.points
    assert 2 * (images.nbytes + points.nbytes) < size < 2.2 * (images.nbytes + points.nbytes)  # sample and batch
    monkeypatch.setattr("kdlab.view.sight.frames.MEMORY", 3.5 * size)
    del one
    gc.collect()
    old, new = (Frames(samples_of(sampler, 4), Looks(grid)) for _ in range(2))  # type: ignore[arg-type]
    for sights, index in ((old, 0), (old, 1), (new, 0), (old, 0), (new, 1)):
        assert isinstance(sights[index], Sight)
    assert [old.ready(i) for i in range(4)] == [True, False, False, False]
    assert [new.ready(i) for i in range(4)] == [True, True, False, False]
    monkeypatch.setattr("kdlab.view.sight.frames.MEMORY", 0)
    assert isinstance(new[2], Sight) and new.ready(2) and not old.ready(0) and not new.ready(1)  # the last one stays


def test_frames_are_shared_by_threads(sampler: Callable[..., Sample], grid: BEVGrid) -> None:
    looks = Looks(grid)
    frames = Frames(samples_of(sampler, 5), looks)  # type: ignore[arg-type]
    found: list[list[Sight]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=lambda to=to: to.extend(frames)) for to in found]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(looks.seen) == list("01234")
    assert all(one is other for row in found for one, other in zip(row, found[0], strict=True))
