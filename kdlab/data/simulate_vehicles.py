"""Shapes of cars, trucks, buses, trailers and construction vehicles: x forward, wheels on z = 0, before fitting."""

from __future__ import annotations

import numpy as np

from kdlab.data.simulate_mesh import Builder, Color, Material

CAR_COLORS: tuple[Color, ...] = (
    (0.78, 0.79, 0.80),
    (0.42, 0.44, 0.46),
    (0.03, 0.03, 0.035),
    (0.55, 0.02, 0.02),
    (0.03, 0.09, 0.33),
    (0.85, 0.85, 0.84),
    (0.10, 0.12, 0.14),
    (0.02, 0.16, 0.12),
    (0.45, 0.36, 0.22),
    (0.05, 0.25, 0.48),
    (0.62, 0.18, 0.03),
    (0.24, 0.25, 0.27),
    (0.60, 0.48, 0.06),
)
BLACK: Color = (0.02, 0.02, 0.022)
GREY: Color = (0.18, 0.18, 0.19)
STEEL: Color = (0.4, 0.41, 0.43)
GLASS: Color = (0.02, 0.028, 0.032)
WHITE: Color = (0.8, 0.8, 0.78)
RED: Color = (0.5, 0.01, 0.01)


def _pick(rng: np.random.Generator, colors: tuple[Color, ...]) -> Color:
    return colors[int(rng.integers(len(colors)))]


def _lights(b: Builder, front: float, rear: float, half: float, z: float, height: float = 0.13) -> None:
    """Head and tail lamps at both ends, and number plates."""
    for side in (-1, 1):
        b.box((front, side * half * 0.76, z), (0.06, half * 0.36, height), (0.9, 0.9, 0.85), Material.HEADLIGHT)
        b.box((rear, side * half * 0.8, z + 0.08), (0.06, half * 0.3, height * 1.2), RED, Material.TAILLIGHT)
    for x in (front, rear):
        b.box((x, 0, z - 0.16), (0.05, 0.46, 0.11), (0.75, 0.74, 0.62), Material.RETRO)


_STYLES = ("sedan", "hatch", "suv", "van", "pickup", "sedan", "hatch", "suv")
# Style: bonnet start, bonnet height at windscreen, boot height, glass bottom (rear, front), roof (rear, front).
_PROFILES: dict[str, tuple[float, float, float, tuple[float, float], tuple[float, float]]] = {
    "sedan": (0.16, 0.60, 0.64, (-0.40, 0.20), (-0.24, 0.04)),
    "hatch": (0.20, 0.60, 0.62, (-0.49, 0.24), (-0.38, 0.08)),
    "suv": (0.20, 0.60, 0.62, (-0.49, 0.24), (-0.43, 0.11)),
    "van": (0.30, 0.52, 0.56, (-0.495, 0.36), (-0.47, 0.18)),
    "pickup": (0.20, 0.58, 0.56, (-0.10, 0.24), (-0.06, 0.10)),
}


def car_size(rng: np.random.Generator, style: str) -> tuple[float, float, float]:
    """Length, width, height of a car in metres."""
    l, w, h = {
        "sedan": (4.7, 1.86, 1.48),
        "hatch": (4.15, 1.80, 1.52),
        "suv": (4.7, 1.95, 1.76),
        "van": (4.95, 2.0, 1.95),
        "pickup": (5.4, 2.05, 1.88),
    }[style]
    k = rng.normal(1, 0.035, 3).clip(0.92, 1.08)
    return l * k[0], w * k[1], h * k[2]


def car_style(rng: np.random.Generator) -> str:
    """A body style at random."""
    return _STYLES[int(rng.integers(len(_STYLES)))]


def car(rng: np.random.Generator, style: str, size: tuple[float, float, float]) -> Builder:
    """A passenger car: hull, glasshouse with pillars and roof, wheels in arches, lamps, mirrors' place left out."""
    b, (l, w, h) = Builder(), size
    paint = _pick(rng, CAR_COLORS)
    bonnet, hood, boot, glass, roof = _PROFILES[style]
    half, low = w / 2 * 0.985, 0.17
    belt, nose = hood * h, 0.46 * h if style != "van" else 0.44 * h
    b.hull(
        [
            (-0.5 * l, 0.26, boot * h * 0.88, half * 0.86),
            (-0.485 * l, low, boot * h, half * 0.95),
            (-0.36 * l, low, boot * h * 1.02, half),
            (bonnet * l, low, belt, half),
            (0.42 * l, low, nose + 0.05, half * 0.96),
            (0.485 * l, 0.19, nose - 0.04, half * 0.86),
            (0.5 * l, 0.26, nose - 0.12, half * 0.76),
        ],
        0.09,
        paint,
        Material.PAINT,
    )
    _glasshouse(b, glass, roof, (l, half, h), belt, paint)
    if style == "pickup":
        b.box((-0.3 * l, 0, 0.575 * h), (0.36 * l, w * 0.78, 0.03), BLACK, Material.RUBBER)
    radius = 0.33 if style in ("sedan", "hatch") else 0.37
    for x in (-0.30 * l, 0.31 * l):
        for side in (-1, 1):
            b.tube(
                (x, side * half * 0.7, radius + 0.05),
                (x, side * (half + 0.006), radius + 0.05),
                radius + 0.05,
                BLACK,
                sides=14,
            )
            b.wheel(x, side * (half + 0.008), radius, 0.2)
    b.box((0, 0, 0.24), (0.5 * l, 2 * half + 0.01, 0.12), (0.04, 0.04, 0.04))
    b.box((0.497 * l, 0, 0.30 * h), (0.03, w * 0.5, 0.09 * h), BLACK)
    _lights(b, 0.482 * l, -0.49 * l, half * 0.93, nose - 0.13)
    for side in (-1, 1):
        b.box((0.02 * l, side * (half + 0.004), belt * 0.9), (0.16, 0.015, 0.03), STEEL, Material.METAL)
        b.box((-0.03 * l, side * (half + 0.002), 0.6 * belt), (0.012, 0.006, 0.7 * belt), BLACK)
    return b


def _glasshouse(
    b: Builder,
    glass: tuple[float, float],
    roof: tuple[float, float],
    size: tuple[float, float, float],
    belt: float,
    paint: Color,
) -> None:
    l, half, h = size
    low_half, high_half, z1 = half * 0.93, half * 0.76, h - 0.05
    ends = [(glass[0] * l, low_half, belt - 0.03), (glass[1] * l, low_half, belt - 0.05)]
    tops = [(roof[0] * l, high_half, z1), (roof[1] * l, high_half, z1)]
    rings = [
        [(x, sign * y, z) for (x, y, z), sign in zip((p, p, q, q), (-1, 1, 1, -1), strict=True)]
        for p, q in (ends, tops)
    ]
    b.loft(np.array(rings), GLASS, Material.GLASS)
    x0, x1 = roof[0] * l, roof[1] * l
    b.hull(
        [
            (x0 - 0.03, z1 - 0.03, h - 0.015, high_half * 0.98),
            (x0 + 0.25, z1 - 0.02, h, high_half * 1.02),
            (x1 - 0.25, z1 - 0.02, h, high_half * 1.02),
            (x1 + 0.03, z1 - 0.03, h - 0.02, high_half * 0.98),
        ],
        0.02,
        paint,
        Material.PAINT,
    )
    for side in (-1, 1):
        for end, top, r in ((ends[0], tops[0], 0.06), (ends[1], tops[1], 0.04)):
            b.tube((end[0], side * end[1], end[2]), (top[0], side * top[1], top[2]), r, paint, Material.PAINT, sides=4)
        for mix in (0.46,) if glass[1] - glass[0] < 0.62 else (0.30, 0.62):
            x = (1 - mix) * glass[0] * l + mix * glass[1] * l
            b.tube((x, side * low_half, belt - 0.04), (x, side * high_half, z1), 0.045, BLACK, Material.MATTE, sides=4)


def truck(rng: np.random.Generator, style: str, size: tuple[float, float, float]) -> Builder:
    """A lorry: cab with glass, and a cargo box ("box"), a loaded flatbed ("flat") or only the tractor ("tractor")."""
    b, (l, w, h) = Builder(), size
    paint = _pick(rng, CAR_COLORS)
    half, cab = w / 2, 2.0 if style != "tractor" else 0.45 * l
    front = l / 2
    top = min(h * (0.82 if style == "box" else 1.0), 2.9 if style != "tractor" else h)
    b.hull(
        [
            (front - cab, 0.5, top, half * 0.93),
            (front - 0.5, 0.42, top, half * 0.95),
            (front - 0.12, 0.42, top * 0.55, half * 0.95),
            (front, 0.45, top * 0.50, half * 0.92),
        ],
        0.1,
        paint,
        Material.PAINT,
    )
    screen = np.array(
        [
            (front - 0.10, -half * 0.86, top * 0.56),
            (front - 0.10, half * 0.86, top * 0.56),
            (front - 0.46, half * 0.84, top * 0.93),
            (front - 0.46, -half * 0.84, top * 0.93),
        ]
    )
    b.loft(np.stack([screen + np.array([0.02, 0, 0.02]), screen - np.array([0.03, 0, 0.03])]), GLASS, Material.GLASS)
    for side in (-1, 1):
        b.box((front - 0.95, side * half * 0.95, top * 0.72), (0.85, 0.03, top * 0.28), GLASS, Material.GLASS)
        b.box((front - 0.5, side * half * 0.97, 0.55), (0.7, 0.06, 0.25), BLACK)
        b.box((front - 0.3, side * (half - 0.07), top * 0.68), (0.1, 0.14, 0.34), BLACK)
    b.box((front - 0.02, 0, top * 0.34), (0.06, half * 1.2, 0.4), BLACK)
    _lights(b, front - 0.03, -front + 0.04, half * 0.92, 0.72)
    b.box((-cab / 2, 0, 0.66), (l - cab, half * 1.1, 0.22), BLACK)
    if style == "box":
        body = _pick(rng, (WHITE, (0.72, 0.73, 0.75), (0.10, 0.22, 0.42), (0.75, 0.62, 0.15), (0.5, 0.1, 0.06)))
        _cargo(b, -l / 2, front - cab - 0.12, w, 0.85, h, body, _pick(rng, CAR_COLORS))
    elif style == "flat":
        b.box((-cab / 2 - 0.05, 0, 0.88), (l - cab - 0.1, w, 0.18), GREY, Material.METAL)
        for x in np.arange(-l / 2 + 0.6, front - cab - 0.6, 1.15):
            tone = rng.uniform(0.2, 0.5)
            b.box(
                (x, rng.uniform(-0.1, 0.1), 1.35),
                (0.95, w * 0.72, rng.uniform(0.5, 0.85)),
                (tone, tone * 0.8, tone * 0.5),
            )
    radius = 0.48
    for x in [front - 1.15, -l / 2 + 1.1] + ([-l / 2 + 2.15] if l > 8 else []):
        for side in (-1, 1):
            b.wheel(x, side * (half - 0.02), radius, 0.3, WHITE)
    return b


def _cargo(b: Builder, x0: float, x1: float, w: float, z0: float, z1: float, body: Color, accent: Color) -> None:
    """A cargo box from x0 to x1 with edge rails, door lines and a coloured stripe."""
    mid, length = (x0 + x1) / 2, x1 - x0
    b.box((mid, 0, (z0 + z1) / 2), (length, w - 0.02, z1 - z0), body, Material.PAINT)
    for side in (-1, 1):
        b.box((mid, side * (w / 2 - 0.012), z0 + 0.06), (length, 0.024, 0.12), STEEL, Material.METAL)
        b.box((mid, side * (w / 2 - 0.012), z1 - 0.06), (length, 0.024, 0.12), STEEL, Material.METAL)
        b.box(
            (mid, side * (w / 2 - 0.008), z0 + 0.55 * (z1 - z0)),
            (length * 0.72, 0.016, 0.42 * (z1 - z0)),
            accent,
            Material.PAINT,
        )
        b.box((x0 + 0.01, side * 0.3, (z0 + z1) / 2), (0.03, 0.05, (z1 - z0) * 0.9), STEEL, Material.METAL)
    b.box((x0 + 0.012, 0, z0 + 0.1), (0.026, w * 0.9, 0.14), (0.6, 0.08, 0.03), Material.RETRO)


def bus(rng: np.random.Generator, size: tuple[float, float, float]) -> Builder:
    """A rigid bus: rows of windows, doors on the kerb side, a lit destination sign, roof units."""
    b, (l, w, h) = Builder(), size
    paint = _pick(
        rng, ((0.62, 0.03, 0.03), (0.75, 0.52, 0.04), (0.05, 0.20, 0.45), (0.78, 0.78, 0.76), (0.06, 0.30, 0.16))
    )
    stripe = _pick(rng, (WHITE, (0.08, 0.09, 0.12), (0.7, 0.7, 0.2)))
    half, front, roof = w / 2, l / 2, h - 0.18
    b.hull(
        [
            (-front, 0.4, roof - 0.12, half * 0.94),
            (-front + 0.15, 0.32, roof, half * 0.985),
            (front - 0.3, 0.32, roof, half * 0.985),
            (front, 0.36, roof - 0.25, half * 0.92),
        ],
        0.14,
        paint,
        Material.PAINT,
    )
    b.box((0, 0, 0.95), (l * 0.97, w * 0.99, 0.16), stripe, Material.PAINT)
    count = int((l - 2.2) / 1.45)
    for side in (-1, 1):
        for i in range(count):
            b.box(
                (-front + 1.1 + i * 1.45, side * (half - 0.012), roof * 0.66),
                (1.32, 0.024, roof * 0.34),
                GLASS,
                Material.GLASS,
            )
    for x in (front - 0.95, -0.3):
        for dx in (-0.31, 0.31):
            b.box((x + dx, -half + 0.01, roof * 0.46), (0.56, 0.03, roof * 0.68), GLASS, Material.GLASS)
    b.box((front - 0.07, 0, roof * 0.60), (0.2, w * 0.84, roof * 0.42), GLASS, Material.GLASS)
    b.box((front - 0.10, 0, roof * 0.885), (0.14, w * 0.6, 0.22), (1.0, 0.45, 0.05), Material.SIGNAL)
    b.box((-front + 0.04, 0, roof * 0.72), (0.1, w * 0.72, roof * 0.26), GLASS, Material.GLASS)
    b.box((-l * 0.18, 0, roof + 0.08), (l * 0.24, w * 0.6, 0.2), (0.6, 0.6, 0.6), taper=(0.9, 0.9))
    b.box((l * 0.24, 0, roof + 0.06), (l * 0.14, w * 0.55, 0.14), (0.6, 0.6, 0.6), taper=(0.9, 0.9))
    _lights(b, front - 0.02, -front + 0.02, half * 0.94, 0.72, 0.18)
    for x in (-front * 0.52, front * 0.58):
        for side in (-1, 1):
            b.tube((x, side * half * 0.7, 0.58), (x, side * (half - 0.012), 0.58), 0.57, BLACK, sides=14)
            b.wheel(x, side * (half - 0.022), 0.48, 0.3)
    return b


def trailer(rng: np.random.Generator, style: str, size: tuple[float, float, float]) -> Builder:
    """A trailer: a cargo box ("box") or a ribbed container on a frame ("container"), axles at the rear."""
    b, (l, w, h) = Builder(), size
    body = _pick(
        rng, (WHITE, (0.66, 0.67, 0.7), (0.08, 0.25, 0.2), (0.42, 0.09, 0.04), (0.06, 0.15, 0.36), (0.6, 0.3, 0.05))
    )
    b.box((0, 0, 0.95), (l * 0.98, w * 0.5, 0.22), BLACK)
    _cargo(b, -l / 2, l / 2, w, 1.08, h, body, _pick(rng, CAR_COLORS) if style == "box" else body)
    if style == "container":
        for x in np.arange(-l / 2 + 0.3, l / 2 - 0.2, 0.55):
            for side in (-1, 1):
                b.box(
                    (x, side * (w / 2 - 0.01), (h + 1.08) / 2),
                    (0.16, 0.02, h - 1.35),
                    (0.72 * body[0], 0.72 * body[1], 0.72 * body[2]),
                    Material.PAINT,
                )
    for i in range(2 if l < 9 else 3):
        for side in (-1, 1):
            b.wheel(-l / 2 + 1.0 + 1.15 * i, side * (w / 2 - 0.02), 0.48, 0.32)
    for side in (-1, 1):
        b.tube(
            (l / 2 - 1.9, side * w * 0.28, 0.02),
            (l / 2 - 1.9, side * w * 0.28, 0.95),
            0.07,
            STEEL,
            Material.METAL,
            sides=6,
        )
        b.box((0.3, side * w * 0.47, 0.7), (l * 0.35, 0.05, 0.3), GREY)
        b.box((-l / 2 + 0.02, side * w * 0.4, 0.92), (0.05, 0.35, 0.14), RED, Material.TAILLIGHT)
    b.box((-l / 2 + 0.05, 0, 0.5), (0.08, w * 0.9, 0.12), (0.6, 0.08, 0.03), Material.RETRO)
    return b


def construction(rng: np.random.Generator, style: str, size: tuple[float, float, float]) -> Builder:
    """A construction vehicle: an excavator with boom and bucket, or a wheel loader."""
    b, (l, w, h) = Builder(), size
    paint: Color = ((0.75, 0.42, 0.02), (0.72, 0.30, 0.02), (0.70, 0.50, 0.03))[int(rng.integers(3))]
    x0, half = -l / 2, w / 2
    if style == "excavator":
        for side in (-1, 1):
            y = side * (half - 0.28)
            b.hull(
                [
                    (x0 + 0.15, 0.25, 0.6, 0.28),
                    (x0 + 0.45, 0.0, 0.82, 0.28),
                    (x0 + l * 0.5, 0.0, 0.82, 0.28),
                    (x0 + l * 0.56, 0.25, 0.6, 0.28),
                ],
                0.05,
                BLACK,
                Material.RUBBER,
                y,
            )
        b.box((x0 + l * 0.28, 0, 0.95), (l * 0.3, w * 0.5, 0.3), GREY)
        b.hull(
            [
                (x0, 1.15, 1.95, half * 0.9),
                (x0 + 0.5, 1.05, 2.1, half * 0.95),
                (x0 + l * 0.42, 1.05, 1.75, half * 0.95),
            ],
            0.12,
            paint,
            Material.PAINT,
        )
        _cab(b, x0 + l * 0.42, half * 0.42, 1.1, h, paint, half * 0.8)
        knee, tip = (l * 0.18, -half * 0.25, h - 0.18), (l * 0.44, -half * 0.25, 1.4)
        b.tube((x0 + l * 0.42, -half * 0.25, 1.5), knee, 0.26, paint, Material.PAINT, 0.17, 4)
        b.tube(knee, tip, 0.18, paint, Material.PAINT, 0.12, 4)
        b.tube(
            (x0 + l * 0.5, -half * 0.25, 1.45), (l * 0.1, -half * 0.25, h * 0.72), 0.07, STEEL, Material.METAL, sides=6
        )
        b.box((l * 0.44, -half * 0.25, 0.75), (0.1 * l, w * 0.36, 1.1), GREY, Material.METAL, taper=(0.4, 0.9))
        return b
    _loader(b, paint, size)
    return b


def _loader(b: Builder, paint: Color, size: tuple[float, float, float]) -> None:
    """A wheel loader: big wheels, engine behind, bucket in front."""
    l, w, h = size
    x0, half = -l / 2, w / 2
    for x in (x0 + l * 0.22, x0 + l * 0.58):
        for side in (-1, 1):
            b.wheel(x, side * (half - 0.01), 0.72, 0.5, paint)
    b.hull(
        [(x0, 0.8, 1.7, half * 0.6), (x0 + 0.4, 0.7, 1.85, half * 0.66), (x0 + l * 0.4, 0.7, 1.8, half * 0.66)],
        0.12,
        paint,
        Material.PAINT,
    )
    b.box((x0 + l * 0.5, 0, 0.95), (l * 0.28, w * 0.4, 0.5), GREY)
    _cab(b, x0 + l * 0.48, 0.0, 1.2, h, paint, half * 1.1)
    for side in (-1, 1):
        y = side * half * 0.42
        b.tube((x0 + l * 0.55, y, 1.5), (l * 0.36, y, 0.7), 0.16, paint, Material.PAINT, 0.13, 4)
    b.hull(
        [(l * 0.34, 0.15, 1.2, half), (l * 0.40, 0.06, 1.0, half), (l * 0.5, 0.02, 0.22, half)],
        0.03,
        GREY,
        Material.METAL,
    )


def _cab(b: Builder, x: float, y: float, low: float, high: float, paint: Color, width: float) -> None:
    """A driver's cab: glass on a painted sill, a roof and four posts."""
    depth = 1.25
    b.box((x - depth / 2 + 0.3, y, low + 0.25), (depth, width, 0.5), paint, Material.PAINT)
    b.box(
        (x - depth / 2 + 0.3, y, (low + high) / 2 + 0.18),
        (depth * 0.95, width * 0.95, high - low - 0.56),
        GLASS,
        Material.GLASS,
        (0.9, 0.92),
    )
    b.box((x - depth / 2 + 0.3, y, high - 0.06), (depth, width, 0.12), paint, Material.PAINT)
    for sx in (-1, 1):
        for sy in (-1, 1):
            foot = (x - depth / 2 + 0.3 + sx * depth * 0.48, y + sy * width * 0.48, low + 0.4)
            b.tube(foot, (foot[0], foot[1], high - 0.05), 0.05, BLACK, sides=4)
    b.tube((x - 0.3, y, high - 0.02), (x - 0.3, y, high), 0.09, (1.0, 0.4, 0.02), Material.SIGNAL, sides=8)
