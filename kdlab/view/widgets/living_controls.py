"""The living scene's sliders, pickers and buttons, and how they lie on the page; what they do is in `living`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets

from kdlab.data.simulate_config import SimulationConfig
from kdlab.sample import CAMERAS
from kdlab.view.widgets.controls import row, slider, toggle, wide

VIEWS = (("norm over channels", "norm"), ("mean over channels", "mean"), ("one channel", "channel"))
"""How channels become a picture, in words and as `layers.View` calls it."""

COMPARISONS = (("change since before", "change"), ("student − teacher", "difference"), ("nothing more", "none"))
"""What is drawn beside the maps of teacher and student."""

REACH = 20.0
"""Metres to either side that the sliders of a move reach at first; a drag may go farther, and they with it."""

BEAMS = (4, 8, 12, 16, 24, 32, 48, 64)

HELP = (
    "<b>Mouse</b>: drag an object on a map to move it, click one to pick it. <b>Keys</b>, once a map has been clicked "
    "or reached with Tab: <kbd>w</kbd> <kbd>s</kbd> <kbd>a</kbd> <kbd>d</kbd> push the picked object ahead, back, "
    "left and right, <kbd>q</kbd> <kbd>e</kbd> turn it, <kbd>x</kbd> removes it or brings it back, <kbd>r</kbd> resets "
    "everything."
)
"""What the line below the maps says."""


PUSHES = {"w": (0.5, 0, 0), "s": (-0.5, 0, 0), "a": (0, 0.5, 0), "d": (0, -0.5, 0), "q": (0, 0, 5), "e": (0, 0, -5)}
"""Keys and what they do to the picked object: metres ahead and to the left, degrees."""


class LivingControls:
    """Everything that can be set; ``.value`` of each is what Python reads and tests set.

    Args:
        config: of the world, whose settings the sliders begin with.
        objects: what can be picked: words and agent.

    Attributes:
        object: the picked agent.
        ahead: how far it was moved along x, metres.
        left: likewise along y.
        turn: how far it was turned, degrees counter-clockwise.
        remove: whether it is gone.
        back: button that puts it back as it was.
        reset: button that puts everything back.
        beams: of the LiDAR.
        dropout: share of its returns lost at random.
        fog: density.
        night: darkness.
        camera: whose written calibration is shifted.
        yaw: its error to the left, degrees.
        pitch: its error upwards, degrees.
        roll: its error clockwise, degrees.
        stage: which map of the detectors.
        view: how its channels become a picture.
        channel: which, where the view is "channel".
        compare: what is drawn beside.
        mask: which mask is drawn.
        min_score: detections below are not drawn.
        mask_threshold: cells of the mask from here on are drawn.
        show_boxes: draw boxes.
        show_points: draw LiDAR points.
        show_mask: draw the mask.
        show_cameras: draw the six images.
        heading: names the world, teacher, student and method.
        place: what was changed and how long it took, in words.
        report: what teacher and student make of the picked object, before and now, as HTML.
    """

    def __init__(self, config: SimulationConfig, objects: Sequence[tuple[str, int]]) -> None:
        self.object = widgets.Dropdown(options=list(objects), description="object", **wide(width="330px"))
        self.ahead = _metres("ahead (m)", "along the ego vehicle's x axis")
        self.left = _metres("left (m)", "along the ego vehicle's y axis")
        self.turn = _angle("turn (°)", 180, 5, "counter-clockwise seen from above")
        self.turn.layout.width = "300px"
        self.remove = widgets.ToggleButton(False, description="remove", icon="trash", **_button())
        self.back = widgets.Button(description="put back", icon="undo", **_button())
        self.reset = widgets.Button(description="reset everything", icon="refresh", **_button("150px"))
        beams = sorted({*BEAMS, config.lidar_beams})
        self.beams = widgets.SelectionSlider(
            options=beams, value=config.lidar_beams, description="beams", tooltip="of the LiDAR", **wide(width="225px")
        )
        self.dropout = slider("drop-out", config.lidar_dropout, "share of LiDAR returns lost at random")
        self.dropout.max = 0.95
        self.fog = slider("fog", config.fog, "images fade, LiDAR returns weaken")
        self.night = slider("night", config.night, "0 is daylight, 1 night; a LiDAR brings its own light")
        for control in (self.dropout, self.fog, self.night):
            control.layout.width = "205px"
        cameras = [(name.removeprefix("CAM_").replace("_", " ").lower(), name) for name in CAMERAS]
        self.camera = widgets.Dropdown(options=cameras, description="camera", **wide(width="180px"))
        self.yaw = _angle("yaw (°)", 10, 0.5, "its calibration says that it looks farther left")
        self.pitch = _angle("pitch (°)", 10, 0.5, "its calibration says that it looks farther up")
        self.roll = _angle("roll (°)", 10, 0.5, "its calibration says that it is turned clockwise")
        self.stage = widgets.Dropdown(options=["bev"], description="stage", **wide(width="170px"))
        self.view = widgets.Dropdown(options=VIEWS, description="shown as", **wide(width="225px"))
        self.channel = widgets.IntSlider(0, min=0, max=0, description="channel", layout=widgets.Layout(width="230px"))
        self.compare = widgets.Dropdown(options=COMPARISONS, description="beside", **wide(width="225px"))
        self.mask = widgets.Dropdown(options=[("none", "")], description="mask", **wide(width="260px"))
        self.min_score = slider("boxes: score from", 0.3, "detections below are not drawn")
        self.mask_threshold = slider("mask: value from", 0.5, "cells of the mask below are not drawn")
        for control in (self.min_score, self.mask_threshold):
            control.layout.width = "250px"
        self.show_boxes = toggle("boxes", True, "true boxes and detections")
        self.show_points = toggle("points", True, "LiDAR points from above")
        self.show_mask = toggle("mask", False, "where the method looks")
        self.show_cameras = toggle("cameras", True, "the six images")
        self.heading, self.place, self.report = (widgets.HTML() for _ in range(3))

    def show_move(self, ahead: float, left: float, turn: float) -> None:
        """Set the sliders of a move: metres, and degrees that are brought to -180..180."""
        for control, value in ((self.ahead, ahead), (self.left, left)):
            control.min, control.max = min(control.min, value), max(control.max, value)
            control.value = value
        self.turn.value = (turn + 180) % 360 - 180

    def lay_out(self, canvas: Any) -> Any:
        """All of it on one page, the canvas in the middle."""
        toggles = (self.show_boxes, self.show_points, self.show_mask, self.show_cameras)
        parts = [
            self.heading,
            _group("Object", self.object, self.remove, self.back),
            _group("", self.ahead, self.left, self.turn),
            _group("Sensors", self.beams, self.dropout, self.fog, self.night),
            _group("Calibration", self.camera, self.yaw, self.pitch, self.roll),
            _group("Shown", self.stage, self.view, self.channel, self.compare, self.min_score),
            _group("", self.mask, self.mask_threshold, *toggles),
            self.report,
            row(self.reset, self.place),
            canvas,
            widgets.HTML(f'<div style="font-size: 12px; line-height: 1.7; opacity: 0.8">{HELP}</div>'),
        ]
        return widgets.VBox(parts, layout=widgets.Layout(width="100%", overflow="hidden"))


def _group(name: str, *items: Any) -> Any:
    """Controls with a name before them."""
    title = widgets.HTML(f"<b>{name}</b>", layout=widgets.Layout(width="88px", flex="0 0 auto"))
    line = widgets.HBox([title, row(*items)], layout=widgets.Layout(width="100%", align_items="flex-start"))
    return line


def _button(width: str = "118px") -> dict[str, Any]:
    return {"layout": widgets.Layout(width=width)}


def _metres(name: str, tooltip: str) -> Any:
    return widgets.FloatSlider(
        0,
        min=-REACH,
        max=REACH,
        step=0.5,
        description=name,
        tooltip=tooltip,
        readout_format=".1f",
        **wide(width="300px"),
    )


def _angle(name: str, most: float, step: float, tooltip: str) -> Any:
    return widgets.FloatSlider(
        0,
        min=-most,
        max=most,
        step=step,
        description=name,
        tooltip=tooltip,
        readout_format=".1f",
        **wide(width="240px"),
    )
