"""Counts what modules do on tensors without data: FLOPs, and bytes that autograd keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kdlab.cost import parameters

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def _nothing() -> dict[Precision, float]:
    return dict.fromkeys(PRECISIONS, 0.0)


@dataclass(frozen=True)
class PartCost:
    """What one part of a step needs.

    Attributes:
        name: of the part.
        parameters: of its modules.
        flop: of the forward pass, two for each multiplication of matrices and convolutions.
        kept: bytes that stay until the backward pass, or until the step's end where nothing is trained, by precision.
        passing: bytes that a part without gradient needs for a moment, by precision.
        trained: the share of ``flop`` that has a backward pass, which costs twice as much again.
    """

    name: str
    parameters: int = 0
    flop: float = 0.0
    kept: Mapping[Precision, float] = field(default_factory=_nothing)
    passing: Mapping[Precision, float] = field(default_factory=_nothing)
    trained: float = 1.0

    @property
    def step_flop(self) -> float:
        """Of forward and backward pass."""
        return self.flop * (1 + 2 * self.trained)


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(found) if isinstance(t, Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return found


class _Kept:
    """Adds up the tensors that autograd keeps, each storage once, parameters left out."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[int, Tensor]] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Note a tensor that is kept."""
        if not isinstance(tensor, nn.Parameter) and not (tensor._base is not None and tensor._base.is_leaf):
            storage = tensor.untyped_storage()
            self.found[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    @property
    def bytes(self) -> int:
        """Of them all."""
        return sum(size for size, _ in self.found.values())


@contextmanager
def _fakes(*modules: nn.Module) -> Iterator[None]:
    """A mode in which tensors hold no data, these modules' weights among them; afterwards they are what they were."""
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    with FakeTensorMode():
        for module in {m for root in modules for m in root.modules()}:
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None:
                        before.append((table, name, tensor))
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                        table[name] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
        try:
            yield
        finally:
            for table, name, tensor in before:
                table[name] = tensor


def measure(
    name: str, run: Callable[..., Any], shapes: Sequence[tuple[int, ...]], modules: Sequence[nn.Module], trained: bool
) -> PartCost:
    """Count what a function of tensors does, without doing it.

    Args:
        name: of the part.
        run: called with float tensors of ``shapes``.
        shapes: of its inputs, which want gradients where it is trained (so that it keeps what it would).
        modules: that it calls.
        trained: there will be a backward pass.
    """
    kept: dict[Precision, float] = {}
    passing: dict[Precision, float] = {}
    flop = 0.0
    for precision in PRECISIONS:
        with _fakes(*modules), FlopCounterMode(display=False) as counter, _Largest() as largest:
            inputs = [torch.zeros(shape).requires_grad_(trained) for shape in shapes]
            saved = _Kept()
            with (
                torch.set_grad_enabled(trained),
                torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
                torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t),
            ):
                results = run(*inputs)
            out = sum(t.untyped_storage().nbytes() for t in tree_leaves(results) if isinstance(t, Tensor))
            kept[precision] = saved.bytes if trained else out
            passing[precision] = 0.0 if trained else 2.0 * largest.bytes
            flop = float(counter.get_total_flops())
            del results, inputs, saved
    return PartCost(name, parameters(*modules), flop, kept, passing, 1.0 if trained else 0.0)
