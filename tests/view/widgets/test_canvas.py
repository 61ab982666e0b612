from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from sight_fakes import sight_of

from kdlab.geometry import BEVGrid
from kdlab.sample import CAMERAS, Boxes3D, Detections, Sample
from kdlab.view.sensors.cameras import project_boxes
from kdlab.view.sight.layers import Layer
from kdlab.view.style import STUDENT, TEACHER, TRUTH
from kdlab.view.widgets.canvas import (
    LOWEST,
    STATIC,
    Canvas,
    box_set,
    boxes_of,
    mask_bytes,
    palettes,
    panel_of,
    pictures_of,
    points_of,
)


def values_of(panel: dict[str, Any]) -> np.ndarray[Any, Any]:
    """A panel's numbers as the page reads them."""
    if panel["kind"] == "float16":
        found = np.frombuffer(panel["values"], "<f2").astype(np.float32) * panel["scale"]
    else:
        steps = np.frombuffer(panel["values"], np.uint8).astype(np.float32)
        found = panel["low"] + (steps - 1) / 254 * (panel["high"] - panel["low"])
        found[steps == 0] = np.nan
    return found.reshape(panel["shape"])


def test_a_panel_keeps_numbers_of_any_size() -> None:
    for size in (1.0, 1e-9, 1e8):  # gradients are far below what half precision holds
        values = (np.linspace(-1, 1, 24).reshape(4, 6) * size).astype(np.float32)
        values[0, 0] = np.nan
        panel = panel_of(Layer("title", values, -size, size, "PuOr", "unit"))
        assert panel["shape"] == [4, 6] and panel["palette"] == "PuOr" and panel["unit"] == "unit"
        np.testing.assert_allclose(values_of(panel), values, rtol=1e-3, atol=1e-6 * size)


def test_a_panel_of_eight_bits_keeps_its_scale_and_what_is_missing() -> None:
    values = np.array([[-5.0, 0.0, 0.25], [1.0, 9.0, np.nan]], np.float32)
    panel = panel_of(Layer("", values, 0.0, 1.0), bits=8)
    assert len(panel["values"]) == 6
    np.testing.assert_allclose(values_of(panel), [[0, 0, 0.25], [1, 1, np.nan]], atol=0.5 / 254)


def test_a_panel_without_a_span_or_with_infinities_is_finite() -> None:
    flat = panel_of(Layer("", np.zeros((2, 2), np.float32), 0.0, 0.0))
    assert not values_of(flat).any()
    endless = panel_of(Layer("", np.full((2, 2), np.inf, np.float32), 0.0, 1.0))
    assert np.isfinite(values_of(endless)).all()


def test_colours_travel_as_they_are() -> None:
    values = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    panel = panel_of(Layer("", values))
    assert panel["kind"] == "rgb" and panel["values"] == values.tobytes() and panel["shape"] == [3, 4]
    with pytest.raises(ValueError, match=r"'odd' must be \[H, W\] or \[H, W, 3\], got \(3, 4, 2\)"):
        panel_of(Layer("odd", values[..., :2]))


def test_there_is_a_colour_map_for_every_palette() -> None:
    from typing import get_args

    from kdlab.view.sight.layers import Palette

    assert set(palettes()) == set(get_args(Palette)) and {len(table) for table in palettes().values()} == {768}
    assert palettes()["viridis"][:3] == bytes((68, 1, 84)) and palettes()["greys"][:3] == b"\xff\xff\xff"


def test_masks_and_points_are_packed(sample: Sample) -> None:
    assert mask_bytes(np.array([[0, 0.5, 2.0], [np.nan, 1.0, -1.0]])) == bytes((0, 128, 255, 0, 255, 0))
    cloud = sample.points.clone()
    cloud[0, 0] = torch.nan
    packed = np.frombuffer(points_of(cloud, limit=100), "<f2").reshape(-1, 3)
    assert 80 <= len(packed) <= 100 and np.isfinite(packed).all() and (np.diff(packed[:, 2]) >= 0).all()
    assert len(points_of(cloud)) == 499 * 6 and points_of(cloud[:0]) == b""


def test_pictures_stand_as_around_the_vehicle(sample: Sample) -> None:
    sample.images[0, 0] = 255
    pictures = pictures_of(sample, height=16)
    assert [p["camera"] for p in pictures] == [5, 0, 1, 4, 3, 2] and pictures[3]["name"] == "back left"
    assert all((p["width"], p["height"]) == (88, 32) for p in pictures)
    images = [cv2.imdecode(np.frombuffer(p["jpeg"], np.uint8), cv2.IMREAD_COLOR) for p in pictures]
    assert images[0].shape == (16, 44, 3) and images[1].mean() > 250 and abs(images[0].mean() - 90) < 3
    assert pictures_of(replace(sample, images=sample.images[:, :0])) == []


def lines_of(found: dict[str, Any], camera: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(found["lines"][camera], "<f4").reshape(-1, 5)


def test_lines_in_the_cameras_are_those_of_the_figures(sample: Sample) -> None:
    values = torch.tensor(
        [[10.0, 0, 1, 4, 2, 1.5, 0.3, 0, 0], [1.0, 0.5, 1, 9, 2, 3, 0, 0, 0], [-9, 2, 1, 4, 2, 2, 1, 0, 0]]
    )
    found = box_set("student", Detections(values, torch.zeros(3).long(), torch.tensor([0.9, 0.8, 0.7])), sample)
    assert len(found["lines"]) == len(CAMERAS)
    for camera in range(6):
        boxes, _ = project_boxes(sample, camera, values)
        size = torch.tensor([88.0, 32.0])
        seen = [b[((b.amax(1) >= 0) & (b.amin(1) <= size)).all(-1)] for b in boxes]
        lines = lines_of(found, camera)
        scores = np.repeat([0.9, 0.8, 0.7], [len(s) for s in seen])
        np.testing.assert_allclose(lines[:, 0], scores, rtol=1e-6)
        np.testing.assert_allclose(lines[:, 1:], torch.cat(seen).reshape(-1, 4), atol=0.06, rtol=1e-4)
    assert (
        len(lines_of(found, 0))
        and len(lines_of(found, 3))
        and not len(lines_of(found, 1)[lines_of(found, 1)[:, 0] < 0.75])
    )


def test_sets_have_their_colours_and_unlikely_boxes_stay_behind(sample: Sample, grid: BEVGrid) -> None:
    values = torch.tensor([[5.0, 1, 1, 4, 2, 2, 0.5, 0, 0]] * 2)
    detected = Detections(values, torch.tensor([3, 4]), torch.tensor([0.5, LOWEST / 2]))
    sight = sight_of(sample, grid, detections={"teacher": detected, "student": detected})
    boxes = boxes_of(sight)
    assert [b["colour"] for b in boxes.values()] == [TRUTH, TEACHER, STUDENT]
    assert len({tuple(b["dash"]) for b in boxes.values()}) == 3  # no need to see colours
    assert boxes["teacher"]["rows"] == [[5.0, 1.0, 4.0, 2.0, 0.5, 0.5, 3]] and boxes["teacher"]["scored"]
    assert len(boxes["truth"]["rows"]) == 2 and not boxes["truth"]["scored"]
    assert set(boxes_of(sight, ("student", "nobody"))) == {"student"}


def test_padding_and_samples_without_boxes_or_images(sampler: Callable[..., Sample]) -> None:
    empty = box_set("truth", Boxes3D.empty(), sampler(Boxes3D.empty()))
    assert empty["rows"] == [] and empty["lines"] == [b""] * 6
    made = Boxes3D.make(torch.ones(2, 9), torch.zeros(2).long(), torch.tensor([True, False]))
    blind = sampler(made)
    blind = replace(blind, images=blind.images[:, :0], frame_from_camera=blind.frame_from_camera[:, :0])
    assert len(box_set("truth", made, blind)["rows"]) == 1 and box_set("truth", made, blind)["lines"] == []


def test_an_update_is_one_message(grid: BEVGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    canvas = Canvas.over(grid)
    assert canvas.extent == [-32, 32, -32, 32] and canvas.cells == [32, 32]
    sent: list[set[str]] = []
    monkeypatch.setattr(Canvas, "send_state", lambda self, key=None: sent.append(set(key or ())))
    serial = canvas.draw(status="computing …", mask=b"123", min_score=0.4)
    assert serial == canvas.serial == 1 and sent == [{"status", "mask", "min_score", "serial"}]
    assert canvas.draw() == 2


def test_the_page_reads_and_writes_traits_that_there_are() -> None:
    source = (STATIC / "canvas.js").read_text()
    used = set(re.findall(r'model\.get\("(\w+)"\)|send\(view, "(\w+)"', source))
    names = {name for pair in used for name in pair if name}
    traits = set(Canvas.class_traits(sync=True))
    assert names <= traits and {"panels", "boxes", "pixels", "cell", "dragged", "key", "shown"} <= names
    watched = set(re.findall(r"(\w+): \[", source[source.index("const STALE") : source.index("function request")]))
    assert watched <= traits and len(watched) > 12
    assert "http" not in source.replace("http://www.w3.org/2000/svg", "")  # nothing comes from a network
