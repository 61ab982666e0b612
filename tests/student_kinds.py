"""The kinds of detectors that are trained, as changes of `mini_run.mini_config`'s."""

from dataclasses import replace
from typing import Any

from kdlab.config import DetectorConfig, Modality

CAMERAS: dict[str, dict[str, Any]] = {
    "BEVDet": {"depth_supervision": False},
    "BEVDepth": {},
    "BEVDet4D": {"depth_supervision": False, "frames": 2},
    "BEVDepth4D": {"frames": 2},
    "BEVDepth4D with gradient": {"frames": 2, "past_gradient": True},
    "simulated fusion": {"simulated_lidar": True},
    "simulated fusion, one lift": {"simulated_lidar": True, "shared_lift": True, "corner_reference": True},
    "simulated fusion without compensation": {"simulated_lidar": True, "geometry_compensation": False},
    "simulated fusion, gated": {"simulated_lidar": True, "fuser": "gated"},
}
"""Camera students by name, which see images alone."""

OTHERS: dict[str, dict[str, Any]] = {
    "LiDAR": {"modality": "lidar"},
    "fusion": {"modality": "fusion"},
    "fusion, gated": {"modality": "fusion", "fuser": "gated"},
    "simulated fusion with LiDAR depth": {"simulated_lidar": True, "lidar_depth": True},
}
"""Detectors that see points."""

KINDS = {**CAMERAS, **OTHERS}


def kind(config: DetectorConfig, name: str) -> DetectorConfig:
    """A detector's config, made one of `KINDS`."""
    changes = dict(KINDS[name])
    modality: Modality = changes.pop("modality", "camera")
    fuser = changes.pop("fuser", "conv")
    return replace(config, modality=modality, fuser=fuser, camera=replace(config.camera, **changes))
