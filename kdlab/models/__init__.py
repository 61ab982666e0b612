"""One family of BEV detectors: LiDAR, camera and both, built from the same blocks."""

from kdlab.models.detector import Channels, Detector, build_detector

__all__ = ["Channels", "Detector", "build_detector"]
