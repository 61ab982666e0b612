"""The 3D scene: geometry that Plotly and Open3D both draw."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from kdlab.geometry import points_in_boxes
from kdlab.sample import CLASSES, Boxes3D, Detections, Sample
from kdlab.view import scene3d_draw
from kdlab.view.scene3d import Geometry, geometry, scene, scene_png, show_window
from kdlab.view.style import CLASS_COLOURS, GREY, STUDENT, TEACHER, TRUTH


def found(boxes: Boxes3D) -> Detections:
    return Detections(boxes.values[:, :9], boxes.labels, torch.tensor([0.9, 0.1]))


def trace(figure: object, begin: str) -> object:
    return next(t for t in figure.data if t.name.startswith(begin))  # type: ignore[attr-defined]


def offscreen(*args: object, **named: object) -> bytes:
    try:
        return scene_png(*args, **named)  # type: ignore[arg-type]
    except RuntimeError as lacking:
        pytest.skip(str(lacking))


def test_points_take_the_class_of_the_box_that_holds_them(sample: Sample) -> None:
    truth = Boxes3D.make(torch.cat((sample.boxes.values, sample.boxes.values[:1])), torch.tensor([0, 8, 3]))
    truth.values[2, 3:6] = torch.tensor([12.0, 6, 4])  # a bus around the car: the smaller box wins
    made = geometry(sample, {"truth": truth}, colour_by="class")
    inside = points_in_boxes(sample.points, truth.values).numpy()
    assert (made.kinds[inside[:, 0]] == 0).all()
    assert (made.kinds[inside[:, 2] & ~inside[:, 0] & ~inside[:, 1]] == 3).all() and (made.kinds == 3).any()
    assert (made.kinds[~inside.any(1)] == -1).all()
    colours = np.asarray(made.cloud.colors)
    grey = tuple(int(GREY[k : k + 2], 16) / 255 for k in (1, 3, 5))
    assert np.allclose(colours[made.kinds == -1], grey)
    blue = tuple(int(CLASS_COLOURS[3][k : k + 2], 16) / 255 for k in (1, 3, 5))
    assert np.allclose(colours[made.kinds == 3], blue)


@pytest.mark.parametrize(("how", "column"), [("height", 2), ("intensity", 3)])
def test_colours_rise_with_what_they_mean(sample: Sample, how: str, column: int) -> None:
    made = geometry(sample, colour_by=how)  # type: ignore[arg-type]
    assert np.allclose(made.values, sample.points[:, column].numpy())
    low, high = made.limits
    assert low < np.median(made.values) < high
    light = np.asarray(made.cloud.colors).sum(1)
    assert np.corrcoef(light, np.clip(made.values, low, high))[0, 1] > 0.95


def test_outlines_are_the_boxes_with_their_heading(sample: Sample) -> None:
    made = geometry(sample, {"truth": sample.boxes, "student": found(sample.boxes)})
    ends = np.asarray(made.lines["truth"].points).reshape(2, 13, 2, 3)
    x, y, z, length, _, height, yaw = sample.boxes.values[1, :7].tolist()
    assert np.allclose(ends[1, :12].reshape(-1, 3).mean(0), (x, y, z), atol=1e-5)
    assert np.isclose(np.ptp(ends[1, :12, :, 2]), height, atol=1e-5)
    start, tip = ends[1, 12]
    assert np.allclose(start, (x, y, z + height / 2), atol=1e-5)
    assert np.isclose(np.arctan2(*(tip - start)[[1, 0]]), yaw, atol=1e-5)
    assert np.linalg.norm(tip - start) > length / 2
    assert len(made.lines["student"].points) == 26, "the box of score 0.1 is left out"
    assert made.titles == {
        "truth": "truth (2)",
        "student": "student (1, score ≥ 0.2)",
        "cameras": "cameras",
        "ego": "ego vehicle",
    }


def test_frusta_begin_at_the_cameras_and_look_outwards(sample: Sample) -> None:
    ends = np.asarray(geometry(sample).lines["cameras"].points).reshape(6, 8, 2, 3)
    assert np.allclose(ends[:, :4, 0], (0, 0, 1.5), atol=1e-5)
    middles = ends[:, :4, 1].mean(1)
    turned = np.degrees(np.arctan2(middles[:, 1], middles[:, 0]))
    assert np.allclose(np.cos(np.radians(turned - [0, -55, -110, 180, 110, 55])), 1, atol=1e-3)


def test_points_alone_have_no_cameras() -> None:
    made = geometry(torch.rand(20, 3))
    assert isinstance(made, Geometry) and list(made.lines) == ["ego"] and (made.intensity == 0).all()
    assert len(scene(torch.zeros(0, 5), {}).data) == 3, "no points, the ego vehicle and its hover point"


def test_the_cell_shows_what_the_geometry_holds(sample: Sample) -> None:
    sets = {"truth": sample.boxes, "teacher": found(sample.boxes), "student": found(sample.boxes)}
    figure = scene(sample, sets)
    cloud = trace(figure, "points")
    assert np.allclose(np.stack((cloud.x, cloud.y, cloud.z), 1), sample.points[:, :3].numpy())  # type: ignore[attr-defined]
    assert np.allclose(cloud.customdata[:, 0], sample.points[:, :2].norm(dim=1).numpy(), atol=1e-4)  # type: ignore[attr-defined]
    for name, colour in zip(sets, (TRUTH, TEACHER, STUDENT), strict=True):
        lines, marks = (t for t in figure.data if t.legendgroup == name)
        assert lines.line.color.upper() == colour and lines.showlegend is not False and not marks.showlegend
        assert np.isnan(lines.x[2::3]).all() and not np.isnan(lines.x[::3]).any()
    words = next(t for t in figure.data if t.legendgroup == "student" and t.hovertext is not None).hovertext
    assert len(words) == 1 and all(part in words[0] for part in ("car", "10.0 m away", "score 0.90"))


def test_axes_have_one_scale_and_the_first_look_is_forward(sample: Sample) -> None:
    box = scene(sample).layout.scene
    spans = {k: np.ptp(box[f"{k}axis"].range) for k in "xyz"}
    assert len({round(spans[k] / box.aspectratio[k], 6) for k in "xyz"}) == 1 and box.aspectmode == "manual"
    eye, centre = box.camera.eye, box.camera.center
    assert eye.x < 0 < centre.x and eye.z > centre.z and eye.y == centre.y == 0


def test_classes_switch_one_by_one_in_the_legend(sample: Sample) -> None:
    names = [t.name for t in scene(sample, colour_by="class").data if t.mode == "markers" and t.showlegend is not False]
    assert names[0].startswith("no box") and all(n.partition(" (")[0] in [*CLASSES, "no box"] for n in names)
    counts = [int(n.partition("(")[2].rstrip(")")) for n in names]
    assert sum(counts) == len(sample.points)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"must be \[P, 3 or more\], got \(4, 2\)"):
        scene(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="'height', 'intensity' or 'class'"):
        scene(torch.zeros(4, 3), colour_by="speed")  # type: ignore[arg-type]


def test_the_picture_without_a_window(sample: Sample) -> None:
    data = offscreen(sample, {"truth": sample.boxes}, size=(320, 200))
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert image.shape == (200, 320, 3)
    green = np.abs(image - [int(TRUTH[k : k + 2], 16) for k in (1, 3, 5)]).sum(-1) < 12
    assert green.sum() > 30, "the outlines have their very colour"
    assert (image == 255).all(-1).mean() > 0.5, "on white"


def test_what_is_missing_is_said_in_words(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene3d_draw.sys, "executable", "false")
    with pytest.raises(RuntimeError, match=r"cannot draw here .* apt-get install .*mesa-vulkan-drivers"):
        scene_png(sample)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no DISPLAY")
def test_a_window_without_a_screen_is_refused(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(RuntimeError, match="needs a screen"):
        show_window(sample)
