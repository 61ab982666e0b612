"""What a preset that carries a paper's settings knows about them: where each comes from, and what is not as there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from kdlab.config import AugmentConfig, DataConfig, Modality, RunConfig
from kdlab.geometry import BEVGrid

FIT = 704 / 1600
"""Image scale that fits nuScenes' width to the papers', which kdlab's ranges of scales refer to."""


@dataclass(frozen=True)
class Paper:
    """Sources of a preset's settings and its deviations from the paper.

    Attributes:
        title: method and venue.
        method: its name in `kdlab.distill.METHODS`.
        code: the released code that ``sources`` cite, and what their short names stand for.
        sources: by dotted name of a field of `RunConfig`: file:line of the released code, or what else tells it.
        deviations: what is not as in the paper, and why.
    """

    title: str
    method: str
    code: str
    sources: Mapping[str, str]
    deviations: tuple[tuple[str, str], ...]

    def describe(self, config: RunConfig, preset: RunConfig) -> str:
        """Printable settings with their sources, what was changed since, and the deviations.

        Args:
            config: of the run.
            preset: what the preset gave.
        """
        lines = [f"{self.title}: settings for {config.detector.modality}", f"sources: {self.code}"]
        for name, source in self.sources.items():
            if not _counts(name, config.detector.modality):
                continue
            value, before = setting(config, name), setting(preset, name)
            changed = "" if value == before else f" (changed, {_short(before)} there)"
            lines.append(f"  {name:32s} {_short(value):>20s}{changed}  {source}")
        lines.append("deviations from the paper, and why:")
        lines += [f"  - {what}: {why}" for what, why in (*self.deviations, *COMMON)]
        return "\n".join(lines)


COMMON: tuple[tuple[str, str], ...] = (
    (
        "LiDAR branches are pillars, finer than the cells and brought to them by residual blocks, not sparse voxels",
        "sparse convolutions need a compiler",
    ),
    ("a task's five box maps share one hidden layer beside the heat map's", "the same computation in one convolution"),
    ("biases and weights of norms do not decay", "a common practice, of little effect here"),
    ("the backbone's stem is trained too, and starts from timm's ImageNet weights", "timm's backbones as they are"),
    (
        "batch norm over all processes, bf16 where the released code has fp16, no accumulation of gradients",
        "the batch size is the total over processes",
    ),
    (
        "lifted points lie in the middles of depth bins and of pixel blocks, not at bins' lower edges and on a grid "
        "from border to border",
        "a bin and its depth target mean one place",
    ),
    (
        "targets' radii solve the equations of the overlap; CenterPoint's code takes other roots, larger by a cell for "
        "buses and trailers at cells of 0.6 m (the methods' masks are drawn with those, as released)",
        "what its paper says",
    ),
)
"""Deviations of all papers' presets."""

TEST_SCALE = (
    "test images are scaled by 0.44 of 900 x 1600, which fits their width, not by 0.48",
    "one rule for all papers' test images",
)
"""A deviation of those presets whose paper tests at another scale."""


def resized(low: float, high: float) -> tuple[float, float]:
    """A paper's range of image scales as `AugmentConfig.resize` has it, relative to `FIT`."""
    return low / FIT - 1, high / FIT - 1


def on_nuscenes(root: str, augment: AugmentConfig, cbgs: bool) -> DataConfig:
    """The trainval set, images as BEVDet's pipeline resizes them."""
    return DataConfig(
        root=root,
        version="v1.0-trainval",
        train="train",
        val="val",
        cbgs=cbgs,
        workers=8,
        images="exact",
        augment=augment,
    )


def setting(config: Any, name: str) -> Any:
    """A field of nested dataclasses by its dotted name.

    Raises:
        AttributeError: there is none.
    """
    for part in name.split("."):
        config = getattr(config, part)
    return config


def leaves(config: Any, where: str = "") -> dict[str, Any]:
    """All fields of nested dataclasses by dotted name; a grid is one of them."""
    found: dict[str, Any] = {}
    for f in fields(config):
        value, name = getattr(config, f.name), f"{where}{f.name}"
        inner = is_dataclass(value) and not isinstance(value, type | BEVGrid)
        found |= leaves(value, f"{name}.") if inner else {name: value}
    return found


def _counts(name: str, modality: Modality) -> bool:
    """Whether a detector of these sensors has the field."""
    return not (
        (name.startswith("detector.camera.") and modality == "lidar")
        or (name.startswith("detector.lidar.") and modality == "camera")
        or (name == "detector.fuser" and modality == "lidar")
    )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, BEVGrid):
        return f"{value.height} x {value.width} of {value.cell} m"
    if isinstance(value, tuple):
        return "(" + ", ".join(_short(v) for v in value) + ")"
    return str(value)
