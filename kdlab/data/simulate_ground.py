"""Paints the ground of a street (asphalt, markings, pavements) and places its buildings, trees and lamps."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from numpy.typing import NDArray

from kdlab.data import simulate_layout as lay
from kdlab.data.simulate_config import Array, SimulationConfig
from kdlab.data.simulate_layout import KERB, PAVEMENT, SIDE_STREET, Building, Layout, Path, Prop

Image = NDArray[np.uint8]
_SHIFT = 4  # Sub-pixel bits of OpenCV's polygon filling.


def _fill(image: Image, cell: float, polygon: Array, label: int) -> None:
    points = np.round((polygon / cell - 0.5) * 2**_SHIFT).astype(np.int32)
    cv2.fillPoly(image, [points], [label], lineType=cv2.LINE_8, shift=_SHIFT)


def _strip(image: Image, cell: float, path: Path, span: tuple[float, float], d0: float, d1: float, label: int) -> None:
    """Fill the band between two offsets along a path."""
    a, b = span
    if b <= a:
        return
    s = np.append(np.arange(a, b, 1.0), b)
    for s0, s1 in zip(s[:-1:4], np.append(s[4::4], b), strict=False):
        part = np.linspace(s0, s1, 5)
        _fill(image, cell, np.concatenate([path.points(part, d0), path.points(part, d1)[::-1]]), label)


def _dashes(
    image: Image,
    cell: float,
    path: Path,
    span: tuple[float, float],
    d: float,
    on: float,
    off: float,
    width: float = 0.15,
) -> None:
    for s in np.arange(span[0], span[1] - on, on + off):
        _strip(image, cell, path, (float(s), float(s + on)), d - width / 2, d + width / 2, lay.WHITE)


def open_spans(layout: Layout, margin: float, side: int = 0) -> list[tuple[float, float]]:
    """Stretches of the road between its cross streets (side: only arms of that side interrupt)."""
    edges, spans = 0.0, []
    for c in layout.crosses:
        if side == 0 or side in c.arms:
            spans.append((edges, c.s - layout.cross_half - margin))
            edges = c.s + layout.cross_half + margin
    spans.append((edges, layout.path.length))
    return [(a, b) for a, b in spans if b > a]


def arm_span(layout: Layout, arm: int, start: float) -> tuple[float, float]:
    """A cross street's arm from `start` metres off the road's middle to its end, along the cross street's path."""
    return (SIDE_STREET + start, 2 * SIDE_STREET) if arm > 0 else (0.0, SIDE_STREET - start)


def paint_ground(layout: Layout, rng: np.random.Generator, extent: tuple[float, float]) -> Image:
    """Draw the ground's labels, [rows, columns], row = y and column = x."""
    cell, path, half = layout.cell, layout.path, layout.half_width
    image: Image = np.zeros((int(extent[1] / cell), int(extent[0] / cell)), dtype=np.uint8)
    whole, outer = (0.0, path.length), half + PAVEMENT
    _strip(image, cell, path, whole, -outer - 2.2, outer + 2.2, lay.GRAVEL)
    for c in layout.crosses:
        for arm in c.arms:
            _strip(
                image,
                cell,
                c.path,
                arm_span(layout, arm, 0),
                -layout.cross_half - 2.4,
                layout.cross_half + 2.4,
                lay.PAVING,
            )
    _strip(image, cell, path, whole, -outer, outer, lay.PAVING)
    for c in layout.crosses:
        for arm in c.arms:
            span = arm_span(layout, arm, 0)
            _strip(image, cell, c.path, span, -layout.cross_half - 0.18, layout.cross_half + 0.18, lay.KERBSTONE)
    _strip(image, cell, path, whole, -half - 0.18, half + 0.18, lay.KERBSTONE)
    for c in layout.crosses:
        for arm in c.arms:
            _strip(image, cell, c.path, arm_span(layout, arm, 0), -layout.cross_half, layout.cross_half, lay.ASPHALT)
    _strip(image, cell, path, whole, -half, half, lay.ASPHALT)
    _patches(image, layout, rng)
    _markings(image, layout, rng)
    return image


def _patches(image: Image, layout: Layout, rng: np.random.Generator) -> None:
    """Repaired asphalt, manholes and the parking lanes' own surface."""
    for side in (-1, 1):
        for span in open_spans(layout, 3.0, side):
            d0, d1 = sorted((side * (layout.parking - 1.65), side * layout.half_width))
            _strip(image, layout.cell, layout.path, span, d0, d1, lay.PARKING)
    for _ in range(int(layout.path.length / 12)):
        s, d = rng.uniform(0, layout.path.length), rng.uniform(-0.8, 0.8) * layout.half_width
        length, width = rng.uniform(1, 7), rng.uniform(0.6, 2)
        _strip(image, layout.cell, layout.path, (s, s + length), d, d + width, lay.PATCH)
    for _ in range(int(layout.path.length / 22)):
        x, y, _ = layout.path.at(rng.uniform(0, layout.path.length), rng.uniform(-0.7, 0.7) * layout.half_width)
        cv2.circle(image, (int(x / layout.cell), int(y / layout.cell)), int(0.33 / layout.cell), [lay.MANHOLE], -1)


def _markings(image: Image, layout: Layout, rng: np.random.Generator) -> None:
    cell, path, width = layout.cell, layout.path, layout.lane_width
    bike_paint = bool(rng.random() < 0.5)
    edge = layout.lanes * width
    for a, b in open_spans(layout, 5.0):
        for d in (-0.14, 0.14):
            _strip(image, cell, path, (a, b), d - 0.07, d + 0.07, lay.YELLOW)
        for side in (-1, 1):
            for lane in range(1, layout.lanes):
                _dashes(image, cell, path, (a, b), side * lane * width, 3.0, 4.5)
            if bike_paint:
                d0, d1 = sorted((side * (edge + 0.1), side * (layout.parking - 1.75)))
                _strip(image, cell, path, (a, b), d0, d1, lay.BIKELANE)
            _strip(image, cell, path, (a, b), side * edge - 0.07, side * edge + 0.07, lay.WHITE)
            _dashes(image, cell, path, (a, b), side * (layout.parking - 1.65), 1.0, 1.0, 0.12)
    for c in layout.crosses:
        _crossing(image, layout, c.s, c.path, c.arms)
    for side in (-1, 1):  # Bays of the parking lane.
        for a, b in open_spans(layout, 9.0, side):
            for s in np.arange(a, b, 6.6):
                d0, d1 = sorted((side * (layout.parking - 1.65), side * (layout.parking - 0.4)))
                _strip(image, cell, path, (float(s), float(s) + 0.12), d0, d1, lay.WHITE)


def _crossing(image: Image, layout: Layout, s: float, cross: Path, arms: tuple[int, ...]) -> None:
    """Zebra crossings and stop lines of one junction."""
    cell, path, half, ch = layout.cell, layout.path, layout.half_width, layout.cross_half
    for side in (-1, 1):
        a, b = sorted((s + side * (ch + 0.8), s + side * (ch + 3.6)))
        for d in np.arange(-half + 0.5, half - 0.5, 1.1):
            _strip(image, cell, path, (a, b), float(d), float(d) + 0.55, lay.WHITE)
        line = s + side * (ch + 5.0)
        d0, d1 = sorted((side * 0.3, side * (layout.bike + 0.7)))
        _strip(image, cell, path, (line - 0.2, line + 0.2), d0, d1, lay.WHITE)
    for arm in arms:
        a, b = sorted((SIDE_STREET + arm * (half + 0.6), SIDE_STREET + arm * (half + 3.2)))
        for d in np.arange(-ch + 0.4, ch - 0.5, 1.1):
            _strip(image, cell, cross, (a, b), float(d), float(d) + 0.55, lay.WHITE)
        line = SIDE_STREET + arm * (half + 4.8)
        d0, d1 = sorted((0.2 * arm, (ch - 0.3) * arm))
        _strip(image, cell, cross, (line - 0.2, line + 0.2), d0, d1, lay.WHITE)
        span = (line + 0.5, 2 * SIDE_STREET) if arm > 0 else (0.0, line - 0.5)
        _dashes(image, cell, cross, span, 0.0, 2.0, 2.5)


def furnished(layout: Layout, ground: Image, rng: np.random.Generator, config: SimulationConfig) -> Layout:
    """The layout with its ground, buildings and street furniture."""
    layout = dataclasses.replace(layout, ground=ground)
    coarse = 0.5
    shape = (int(ground.shape[0] * layout.cell / coarse), int(ground.shape[1] * layout.cell / coarse))
    taken: Image = (cv2.resize(ground, shape[::-1], interpolation=cv2.INTER_NEAREST) != lay.GRASS).astype(np.uint8)
    buildings = _street_fronts(layout, taken, coarse, rng) + _skyline(layout, taken, coarse, rng)
    props = _street_props(layout, rng, config) + _greens(layout, taken, coarse, rng)
    return dataclasses.replace(layout, buildings=tuple(buildings), props=tuple(props))


def footprint(building: Building, grow: float = 0.0) -> Array:
    """Corners [4, 2] of a building on the ground."""
    l, w, _ = building.size
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * ((l / 2 + grow), (w / 2 + grow))
    c, s = np.cos(building.yaw), np.sin(building.yaw)
    return np.asarray(corners @ np.array([[c, s], [-s, c]]) + (building.x, building.y), dtype=np.float64)


def _claim(taken: Image, cell: float, building: Building) -> bool:
    """Whether a building fits on free ground; if so the ground is taken."""
    polygon = footprint(building, 0.5)
    rows, columns = taken.shape
    low = np.floor(polygon.min(0) / cell).astype(int) - 1
    high = np.ceil(polygon.max(0) / cell).astype(int) + 2
    low, high = low.clip(0, (columns, rows)), high.clip(0, (columns, rows))
    if (high <= low).any():
        return True  # Outside the drawn ground: nothing there to hit.
    window = taken[low[1] : high[1], low[0] : high[0]]
    mask = np.zeros_like(window)
    _fill(mask, cell, polygon - low * cell, 1)
    if (window & mask).any():
        return False
    window |= mask
    return True


def _street_fronts(layout: Layout, taken: Image, cell: float, rng: np.random.Generator) -> list[Building]:
    """Houses along the road and along the arms of its cross streets."""
    buildings: list[Building] = []
    rows: list[tuple[Path, int, float, float, float]] = [
        (layout.path, side, layout.half_width + PAVEMENT, 0.0, layout.path.length) for side in (-1, 1)
    ]
    for c in layout.crosses:
        for arm in c.arms:
            a, b = arm_span(layout, arm, layout.half_width + PAVEMENT + 2)
            rows += [(c.path, side, layout.cross_half + 2.4, a, b) for side in (-1, 1)]
    for path, side, offset, a, b in rows:
        s = a + rng.uniform(0, 4)
        low_rise = rng.random() < 0.3
        while s < b - 5:
            width, depth = float(rng.uniform(9, 22)), float(rng.uniform(9, 15))
            height = float(
                rng.uniform(4, 8) if low_rise else rng.choice([7.5, 10.8, 14.1, 17.4, 24.0]) + rng.uniform(0, 0.8)
            )
            setback = float(rng.uniform(2.3, 4.0) if rng.random() < 0.8 else rng.uniform(4, 9))
            x, y, yaw = path.at(s + width / 2, side * (offset + setback + depth / 2))
            heading = float(yaw) + (0.0 if side > 0 else np.pi)
            building = Building(float(x), float(y), heading, (width, depth, height), int(rng.integers(2**31)))
            if rng.random() < 0.9 and _claim(taken, cell, building):
                buildings.append(building)
                s += width + float(rng.choice([1.2, 1.2, 3.0, 7.0]))
            else:
                s += 3.5
    return buildings


def _skyline(layout: Layout, taken: Image, cell: float, rng: np.random.Generator) -> list[Building]:
    """Taller blocks behind and around, which close the view."""
    buildings: list[Building] = []
    for _ in range(90):
        x, y, _ = layout.path.at(
            rng.uniform(-140, layout.path.length + 140), rng.choice([-1, 1]) * rng.uniform(38, 150)
        )
        size = (float(rng.uniform(14, 30)), float(rng.uniform(14, 26)), float(rng.uniform(12, 42)))
        building = Building(float(x), float(y), float(rng.uniform(-np.pi, np.pi)), size, int(rng.integers(2**31)))
        if _claim(taken, cell, building):
            buildings.append(building)
    for end, sign in ((0.0, -1.0), (layout.path.length, 1.0)):  # Something stands where the road runs out.
        for d in np.arange(-60, 61, 22.0):
            x, y, yaw = layout.path.at(end + sign * (110 + rng.uniform(0, 15)), d)
            size = (22.0, 16.0, float(rng.uniform(10, 30)))
            building = Building(float(x), float(y), float(yaw) + np.pi / 2, size, int(rng.integers(2**31)))
            if _claim(taken, cell, building):
                buildings.append(building)
    return buildings


def _street_props(layout: Layout, rng: np.random.Generator, config: SimulationConfig) -> list[Prop]:
    """Lamps, trees, signs and benches in a row beside the kerb, and traffic lights at junctions."""
    props: list[Prop] = []

    def put(kind: str, s: float, side: int, d: float) -> None:
        x, y, yaw = layout.path.at(s, side * d)
        props.append(
            Prop(kind, float(x), float(y), KERB, float(yaw) + (np.pi if side > 0 else 0.0), int(rng.integers(2**31)))
        )

    for side in (-1, 1):
        trees = rng.random() < 0.8
        for k, s in enumerate(np.arange(6.0 + 4 * (side > 0), layout.path.length - 2, 7.5)):
            if layout.near_cross(float(s), 5.5, side) or rng.random() > 0.55 + 0.35 * min(config.occlusion, 1.2):
                continue
            if k % 4 == 0:
                put("lamp", float(s), side, layout.half_width + 0.55)
            elif k % 4 == 2 and trees:
                put("tree", float(s), side, layout.half_width + 0.7)
            elif rng.random() < 0.35:
                put(str(rng.choice(["sign", "bench", "bush"])), float(s), side, layout.half_width + 0.6)
    for c in layout.crosses:
        for side in (-1, 1):
            put("signal", c.s - side * (layout.cross_half + 4.6) * -1, side, layout.half_width + 0.5)
    return props


def _greens(layout: Layout, taken: Image, cell: float, rng: np.random.Generator) -> list[Prop]:
    """Trees and bushes on the free ground behind the pavements."""
    props: list[Prop] = []
    for _ in range(int(layout.path.length * 0.45)):
        d = rng.choice([-1, 1]) * (layout.half_width + PAVEMENT + rng.uniform(3.5, 45))
        x, y, yaw = layout.path.at(rng.uniform(0, layout.path.length), d)
        i, j = int(y / cell), int(x / cell)
        reach = 4
        if reach <= i < taken.shape[0] - reach and reach <= j < taken.shape[1] - reach:
            window = taken[i - reach : i + reach + 1, j - reach : j + reach + 1]
            if not window.any():
                kind = "tree" if rng.random() < 0.7 else "bush"
                props.append(Prop(kind, float(x), float(y), 0.0, float(yaw), int(rng.integers(2**31))))
                window[:] = 1
    return props
