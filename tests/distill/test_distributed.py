from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distill_fakes import GRID, boxes, features

from kdlab.distill import Context, run_terms, unidistill
from kdlab.distill.terms import mean_over_ranks


def _values(rank: int):
    counts = ((3, 1), (0, 0))[rank]  # one rank has no box at all
    context = Context(features(rank), features(rank + 7), boxes(rank, counts), GRID)
    method = unidistill().reweight(dict.fromkeys(("feature", "relation", "response_class", "response_regression"), 1.0))
    return context, {n: r.value.detach() for n, r in run_terms(method, context).items()}


def _work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save((_values(rank)[1], mean_over_ranks(torch.tensor(float(rank)))), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_normalisers_are_averaged_over_ranks(tmp_path: Path):
    torch.set_num_threads(1)
    mp.spawn(_work, args=(str(tmp_path),), nprocs=2)
    alone = _values(0)[1]
    together, mean = torch.load(tmp_path / "0.pt")
    empty, _ = torch.load(tmp_path / "1.pt")
    assert mean == 0.5 and all(v == 0 for v in empty.values())
    for name, value in alone.items():  # the other rank's count is 0, so the mean is half of this rank's
        torch.testing.assert_close(together[name], 2 * value, rtol=1e-3, atol=1e-5)
