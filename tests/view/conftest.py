"""A small made-up sample that needs no data set, and a check that every figure passes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from kdlab.geometry import BEVGrid, yaw_pose
from kdlab.sample import Boxes3D, Sample

YAWS = (0, -55, -110, 180, 110, 55)  # degrees, in the order of CAMERAS


def make_sample(boxes: Boxes3D | None = None, points: int = 500) -> Sample:
    """Six cameras 1.5 m above the ground that look outwards, random points, two boxes ahead unless others are given."""
    axes = torch.tensor([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    poses = [yaw_pose(math.radians(yaw), (0, 0, 1.5)) @ axes for yaw in YAWS]
    matrix = torch.tensor([[60.0, 0, 44], [0, 60, 16], [0, 0, 1]])
    generator = torch.Generator().manual_seed(0)
    cloud = torch.rand(points, 5, generator=generator) * torch.tensor([60.0, 60, 3, 1, 0])
    cloud[:, :2] -= 30
    default = torch.tensor([[10.0, 0, 1, 4, 2, 1.5, 0, 0, 0], [15, 3, 1, 0.7, 0.7, 1.8, 2, torch.nan, torch.nan]])
    return Sample(
        token="token",
        scene="scene",
        timestamp=0.0,
        images=torch.full((1, 6, 3, 32, 88), 90, dtype=torch.uint8),
        image_from_camera=matrix.expand(1, 6, 3, 3).clone(),
        frame_from_camera=torch.stack(poses)[None].float(),
        key_from_frame=torch.eye(4)[None],
        frame_times=torch.zeros(1),
        points=cloud,
        boxes=Boxes3D.make(default, torch.tensor([0, 8])) if boxes is None else boxes,
        global_from_key=torch.eye(4, dtype=torch.float64),
        bev_augmentation=torch.eye(4),
        lidar_origin=torch.tensor([0.9, 0.0, 1.8]),
    )


def drawn(figure: Figure) -> Figure:
    """The figure, after it has been drawn and every text was found inside it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    whole = figure.bbox
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text() and not text.get_clip_on():
            box = text.get_window_extent(canvas.get_renderer())
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1
            assert inside, f"{text.get_text()!r} is cut off"
    return figure


@pytest.fixture
def sample() -> Sample:
    return make_sample()


@pytest.fixture
def sampler() -> Callable[..., Sample]:
    return make_sample


@pytest.fixture
def draw() -> Callable[[Figure], Figure]:
    return drawn


@pytest.fixture
def grid() -> BEVGrid:
    return BEVGrid.square(32.0, 2.0)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
