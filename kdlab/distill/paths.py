"""Tensors by name: what a detector can be asked for, and how wide it is before anything runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

from torch import Tensor

from kdlab.sample import Features, Predictions


class Channels(Protocol):
    """Widths of everything in `Features` that a detector fills; None or 0 where it has no such tensor.

    ``camera_bev`` stands for ``camera_bev_aligned`` too, which hold ``frames`` frames; ``depth`` is the number of bins.
    """

    @property
    def image(self) -> int | None: ...  # noqa: D102
    @property
    def depth(self) -> int | None: ...  # noqa: D102
    @property
    def camera_bev(self) -> int | None: ...  # noqa: D102
    @property
    def lidar_bev(self) -> int | None: ...  # noqa: D102
    @property
    def bev(self) -> int | None: ...  # noqa: D102
    @property
    def stages(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def neck(self) -> int | None: ...  # noqa: D102
    @property
    def heatmap(self) -> int | None: ...  # noqa: D102
    @property
    def regression(self) -> int | None: ...  # noqa: D102
    @property
    def frames(self) -> int: ...  # noqa: D102


class HasChannels(Protocol):
    """Anything whose widths are known before it runs: a detector or a label encoder."""

    @property
    def channels(self) -> Channels: ...  # noqa: D102


@dataclass(frozen=True)
class Part:
    """The ``index``-th of ``of`` equal parts of the channels; the last one takes what is left over.

    Where a tensor holds frames side by side (``[:]``), it is such a part of each frame's channels, or with ``across``
    of all channels together.
    """

    index: int
    of: int
    across: bool = False

    def width(self, width: int, frames: int = 1) -> int:
        """How many of a tensor's channels it holds."""
        groups = 1 if self.across else frames
        return groups * len(range(*self.slice(width // groups).indices(width // groups)))

    def take(self, tensor: Tensor, frames: int = 1) -> Tensor:
        """These channels of a tensor [..., C, H, W]."""
        split = tensor.unflatten(-3, (1 if self.across else frames, -1))
        part: Tensor = split[..., self.slice(split.shape[-3]), :, :]
        return part.flatten(-4, -3)

    def slice(self, width: int) -> slice:
        """The channels of a tensor of this width."""
        each = width // self.of
        return slice(self.index * each, width if self.index == self.of - 1 else (self.index + 1) * each)


_FIELDS = ("image", "depth", "camera_bev", "camera_bev_aligned", "lidar_bev", "bev", "stages", "neck", "predictions")
_PATH = re.compile(r"(student|teacher|labels)\.(\w+)(?:\.(heatmap|regression))?(?:\[(-?\d+|:)\])?")


@dataclass(frozen=True)
class TensorPath:
    """A tensor by name: ``teacher.stages[0]``, ``student.camera_bev[0]`` (a frame), ``student.predictions.heatmap``.

    Stages may be counted from the deepest: ``stages[-1]``. ``student.camera_bev_aligned[:]`` are all frames side by
    side, as channels.
    """

    text: str
    side: str
    name: str
    part: str | None
    index: int | None
    joined: bool = False

    @classmethod
    def parse(cls, text: str) -> TensorPath:
        """Read a path.

        Raises:
            ValueError: no such side or field; the message lists the known ones.
        """
        match = _PATH.fullmatch(text)
        if not match or match[2] not in _FIELDS:
            raise ValueError(
                f"unknown tensor {text!r}: write student., teacher. or labels. and one of {', '.join(_FIELDS)}; "
                "stages take an index, predictions may be followed by .heatmap or .regression"
            )
        joined = match[4] == ":"
        index = None if match[4] is None or joined else int(match[4])
        path = cls(text, match[1], match[2], match[3], index, joined)
        if joined and path.name not in ("camera_bev", "camera_bev_aligned"):
            raise ValueError(f"unknown tensor {text!r}: only camera_bev and camera_bev_aligned take [:]")
        if path.name == "stages" and index is None:
            raise ValueError(f"unknown tensor {text!r}: stages needs an index, such as stages[0]")
        if index is not None and index < 0 and path.name != "stages":
            raise ValueError(f"unknown tensor {text!r}: only stages are counted from the end")
        if path.name in ("bev", "lidar_bev", "neck", "predictions") and index is not None:
            raise ValueError(f"unknown tensor {text!r}: {path.name} takes no index")
        if path.part and path.name != "predictions":
            raise ValueError(f"unknown tensor {text!r}: {path.name} has no .{path.part}")
        return path

    def width(self, channels: Channels) -> int | None:
        """Its number of channels; None where the detector has no such tensor."""
        if self.name == "stages":
            return channels.stages[self.index] if _within(self.index, channels.stages) else None
        names = {"camera_bev_aligned": "camera_bev", "predictions": self.part or "heatmap"}
        width: int | None = getattr(channels, names.get(self.name, self.name))
        return (width or 0) * (channels.frames if self.joined else 1) or None

    def frames(self, channels: Channels) -> int:
        """How many frames it holds side by side."""
        return channels.frames if self.joined else 1

    def frames_in(self, features: Features) -> int:
        """The same of features that are at hand."""
        return int(getattr(features, self.name).shape[1]) if self.joined else 1

    def read(self, features: Features) -> Tensor | Predictions:
        """The tensor (or whole predictions).

        Raises:
            ValueError: the features do not hold it.
        """
        value: Any = getattr(features, self.name)
        if value is not None and self.part:
            value = getattr(value, self.part)
        if value is not None and self.index is not None:
            if self.name == "stages":
                value = value[self.index] if _within(self.index, value) else None
            else:
                value = value[:, self.index]
        if value is not None and self.joined:
            value = value.flatten(1, 2)
        if value is None:
            raise ValueError(f"{self.text} is missing: the {self.side}'s features do not hold it")
        found: Tensor | Predictions = value
        return found


def _within(index: int | None, values: Sequence[Any]) -> TypeGuard[int]:
    return index is not None and -len(values) <= index < len(values)
