from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distill_fakes import GRID, boxes, features

from kdlab.distill import Context, run_terms, total
from kdlab.distill.unidistill import unidistill
from kdlab.sample import Boxes3D, Features, Predictions, TaskPrediction

TERMS = ("feature", "relation", "response_class", "response_regression")
CASES = {"uneven": ((3, 1), (2, 0)), "one rank without boxes": ((3, 1), (0, 0))}


def _joined(parts: list[Features]) -> Features:
    tasks = [p.predictions.tasks[0] for p in parts]
    names = ("heatmap", "reg", "height", "dim", "rot", "vel")
    task = TaskPrediction(*(torch.cat([getattr(t, n) for t in tasks]) for n in names))
    neck = torch.cat([p.neck for p in parts])
    return Features(torch.cat([p.bev for p in parts]), neck=neck, predictions=Predictions((task,)))


def _step(students: list[Features], ranks: list[int], counts: tuple[tuple[int, ...], ...]):
    """Values and the total's gradients of these ranks' samples in one batch."""
    found = [boxes(rank, counts[rank]) for rank in ranks]
    padded = Boxes3D.pad([one[i] for one in found for i in range(2)])
    context = Context(_joined(students), _joined([features(rank + 7) for rank in ranks]), padded, GRID)
    results = run_terms(unidistill().reweight(dict.fromkeys(TERMS, 1.0)), context)
    leaves = [leaf for s in students for leaf in (s.bev, s.neck, s.predictions.tasks[0].heatmap)]
    gradients = torch.autograd.grad(total(results), leaves, materialize_grads=True)
    return {n: r.value.detach() for n, r in results.items()}, gradients


def _work(rank: int, folder: str, counts: tuple[tuple[int, ...], ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(_step([features(rank)], [rank], counts), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_average_to_one_process(tmp_path: Path, case: str):
    torch.set_num_threads(1)
    counts = CASES[case]
    mp.spawn(_work, args=(str(tmp_path), counts), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    values, gradients = _step([features(0), features(1)], [0, 1], counts)
    for name, value in values.items():
        assert value > 0
        # eps (1e-4) is added to the mean count, not to the sum
        torch.testing.assert_close((ranks[0][0][name] + ranks[1][0][name]) / 2, value, rtol=1e-4, atol=1e-6)
    both = [gradient / 2 for rank in ranks for gradient in rank[1]]
    for ours, theirs in zip(both, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    if counts[1] == (0, 0):
        assert all(v == 0 for v in ranks[1][0].values()) and all(not g.any() for g in ranks[1][1])
