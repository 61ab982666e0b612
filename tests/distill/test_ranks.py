"""Two processes with a part of a batch each average to one with all of it, for every term of every method."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from all_methods import MASKED, NAMES, RECT, changed, distiller_of, leaves, maps, method_of, some_boxes, unit
from distill_fakes import batch_of

from kdlab.distill import total

COUNTS = {"unequal": ((5, 1), (2, 0)), "one rank without boxes": ((3, 1), (0, 0)), "as released": ((3, 1), (3, 0))}
"""Of both ranks' samples. As released, padding rows count, so both ranks' batches must be padded alike."""
CASES = tuple((name, case) for name in NAMES for case in COUNTS)
ON_ITS_OWN = {"label_0", "label_1", "lidar_0", "lidar_1"}
"""LabelDistill's, which as released divide by the mask of one process."""
ADDED_UP = {"prediction_class", "prediction_box"}
"""SimDistill's, which as released are sums over samples."""


def step(name: str, case: str, ranks: list[int]) -> tuple[dict, list, dict]:
    """Values, gradients at the student's features and at the adapters, of these ranks' samples in one batch."""
    rows = slice(2 * ranks[0], 2 * ranks[-1] + 2)
    method = unit(method_of(name, "released" if case == "as released" else "intended"))
    boxes = some_boxes(3, sum(COUNTS[case], ()))[rows]
    boxes = boxes.keep(boxes.valid)  # padded as these samples need
    student, teacher, labels = (
        changed(maps(i, 4, RECT), lambda t: t.detach()[rows].requires_grad_() if t.ndim else t) for i in (5, 6, 7)
    )
    distiller = distiller_of(method, teacher, labels, RECT).eval()
    results = distiller(student, batch_of(boxes))
    parameters = {n: p for n, p in distiller.named_parameters() if not n.startswith("teacher_parts")}
    found = torch.autograd.grad(
        total(results), [*leaves(student), *parameters.values()], allow_unused=True, materialize_grads=True
    )
    at_adapters = dict(zip(parameters, found[len(leaves(student)) :], strict=True))
    return {n: r.value.detach() for n, r in results.items()}, list(found[: len(leaves(student))]), at_adapters


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({key: step(*key, [rank]) for key in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_average_to_one_process(ranks, name, case):
    values, gradients, adapters = step(name, case, [0, 1])
    parts = [rank[name, case] for rank in ranks]
    as_released = case == "as released"
    for term, value in values.items():
        mean = (parts[0][0][term] + parts[1][0][term]) / 2
        assert value > 0, term
        if as_released and term in ON_ITS_OWN:
            assert (mean - value).abs() > 1e-3 * value, term
        else:
            factor = 2 if as_released and term in ADDED_UP else 1
            torch.testing.assert_close(mean * factor, value, rtol=1e-4, atol=1e-6, msg=term)
    if case == "one rank without boxes":
        assert all(parts[1][0][term] == 0 for term in MASKED[name, "intended"])
    if as_released and (ON_ITS_OWN | ADDED_UP) & set(values):
        return
    assert any(g.any() for g in gradients)
    for k, whole in enumerate(gradients):
        both = torch.cat([part[1][k] for part in parts]) / 2
        torch.testing.assert_close(both, whole, rtol=1e-4, atol=1e-6)
    for parameter, whole in adapters.items():
        torch.testing.assert_close((parts[0][2][parameter] + parts[1][2][parameter]) / 2, whole, rtol=1e-4, atol=1e-5)
