"""The explorer's sliders, pickers and toggles, and how they lie on the page; what they do is in `explorer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets

from kdlab.distill.method import Quirk

VIEWS = (
    ("norm over channels", "norm"),
    ("mean over channels", "mean"),
    ("PCA as colours", "pca"),
    ("one channel", "channel"),
)
"""How channels become a picture, in words and as `layers.View` calls it."""

HELP = (
    "<b>Mouse</b>: move over a map to read all of them, click a cell to ask about it. "
    "<b>Keys</b>, once a map has been clicked or reached with Tab: <kbd>space</kbd> plays and stops, "
    "<kbd>[</kbd> <kbd>]</kbd> or <kbd>PageUp</kbd> <kbd>PageDown</kbd> step through the frames, "
    "<kbd>←</kbd> <kbd>↑</kbd> <kbd>↓</kbd> <kbd>→</kbd> move the cell, <kbd>Esc</kbd> lets it go."
)
"""What the line below the maps says."""


def wide(**options: Any) -> dict[str, Any]:
    """Options of a widget whose description takes the room that it needs."""
    return {"style": {"description_width": "initial"}, "layout": widgets.Layout(**options)}


def row(*items: Any) -> Any:
    """Widgets side by side, in a further line where the page is narrow."""
    layout = widgets.Layout(flex_flow="row wrap", align_items="center", width="100%", grid_gap="0 14px")
    return widgets.HBox(list(items), layout=layout)


def toggle(name: str, on: bool, tooltip: str) -> Any:
    """A small checkbox."""
    return widgets.Checkbox(on, description=name, tooltip=tooltip, indent=False, layout=widgets.Layout(width="auto"))


def slider(name: str, value: float, tooltip: str) -> Any:
    """A threshold from 0 to 1."""
    return widgets.FloatSlider(
        value, min=0, max=1, step=0.01, description=name, tooltip=tooltip, readout_format=".2f", **wide(width="330px")
    )


def shown_by(controls: Any) -> dict[str, bool]:
    """What the toggles of an explorer or a living scene let the canvas draw."""
    return {name: getattr(controls, f"show_{name}").value for name in ("boxes", "points", "mask", "cameras")}


class Controls:
    """Everything that a person can set, as ipywidgets; ``.value`` of each is what Python reads and tests set.

    Args:
        frames: their number.
        quirks: of the method.
        on: names of those that are on.
        fixed: quirks that cannot be switched here, with the reason in words.

    Attributes:
        frame: place in the data.
        play: whether frames follow each other.
        back: button to the frame before.
        forward: button to the next one.
        stage: which map of the detectors.
        view: how its channels become a picture.
        channel: which, where the view is "channel".
        term: a term of the method, or "all".
        what: the term's "loss" or "gradient".
        quirks: a checkbox for each quirk, by name.
        min_score: detections below are not drawn.
        mask: which mask is drawn.
        mask_threshold: cells of the mask from here on are drawn.
        show_boxes: draw boxes.
        show_points: draw LiDAR points.
        show_mask: draw the mask.
        show_cameras: draw the six images.
        show_similarity: similarity of the picked cell to every other cell, as further maps.
        heading: names data, teacher, student and method.
        place: scene and frame in words.
        report: what is known of the picked cell, as HTML.
    """

    def __init__(self, frames: int, quirks: Sequence[Quirk], on: Iterable[str], fixed: Mapping[str, str]) -> None:
        self.frame = widgets.IntSlider(0, min=0, max=max(frames - 1, 0), description="frame", **wide(width="420px"))
        self.play = widgets.ToggleButton(
            False,
            description="play",
            icon="play",
            tooltip="show frame after frame",
            layout=widgets.Layout(width="90px"),
        )
        small = widgets.Layout(width="42px")
        self.back = widgets.Button(icon="step-backward", tooltip="frame before", layout=small)
        self.forward = widgets.Button(icon="step-forward", tooltip="next frame", layout=small)
        self.stage = widgets.Dropdown(options=["bev"], description="stage", **wide(width="230px"))
        self.view = widgets.Dropdown(options=VIEWS, description="shown as", **wide(width="240px"))
        self.channel = widgets.IntSlider(
            0, min=0, max=0, description="channel", disabled=True, layout=widgets.Layout(width="260px", display="none")
        )
        self.term = widgets.Dropdown(options=[("all terms", "all")], description="term", **wide(width="260px"))
        self.what = widgets.ToggleButtons(
            options=["loss", "gradient"],
            tooltips=["the loss of each cell", "how strongly the loss pulls on the student's map"],
            style={"button_width": "76px"},
        )
        self.min_score = slider("boxes: score from", 0.3, "detections below are not drawn")
        self.mask = widgets.Dropdown(options=[("none", "")], description="mask", **wide(width="240px"))
        self.mask_threshold = slider("mask: value from", 0.5, "cells of the mask below are not drawn")
        self.show_boxes = toggle("boxes", True, "true boxes and detections")
        self.show_points = toggle("points", False, "LiDAR points from above")
        self.show_mask = toggle("mask", False, "where the method looks")
        self.show_cameras = toggle("cameras", True, "the six images")
        self.show_similarity = toggle("similarity", True, "of the picked cell to every other cell")
        self.quirks = {q.name: self._quirk(q, q.name in on, fixed.get(q.name, "")) for q in quirks}
        self.heading, self.place, self.report = (widgets.HTML() for _ in range(3))
        self._frames = frames
        self._notes = [escape(fixed.get(q.name, "") or q.what) for q in quirks]

    @staticmethod
    def _quirk(quirk: Quirk, on: bool, fixed: str) -> Any:
        name = quirk.name.split(".")[-1].replace("_", " ")
        return widgets.Checkbox(
            on,
            description=name,
            tooltip=quirk.what,
            indent=False,
            disabled=bool(fixed),
            layout=widgets.Layout(width="220px"),
        )

    def lay_out(self, canvas: Any) -> Any:
        """All of it on one page, the canvas in the middle."""
        playing = [] if self._frames < 2 else [widgets.HBox([self.back, self.play, self.forward])]
        toggles = (self.show_boxes, self.show_points, self.show_mask, self.show_cameras, self.show_similarity)
        rows = [
            self.heading,
            row(*playing, self.frame, self.place),
            row(self.stage, self.view, self.channel, self.term, self.what),
            row(widgets.Label("show"), *toggles),
            row(self.min_score, self.mask, self.mask_threshold),
            *self._quirk_rows(),
            canvas,
            self.report,
            widgets.HTML(f'<div style="font-size: 12px; line-height: 1.7; opacity: 0.8">{HELP}</div>'),
        ]
        return widgets.VBox(rows, layout=widgets.Layout(width="100%", overflow="hidden"))

    def _quirk_rows(self) -> list[Any]:
        """The quirks with what each does, folded away until asked for."""
        if not self.quirks:
            return []
        rows = []
        for box, note in zip(self.quirks.values(), self._notes, strict=True):
            text = widgets.HTML(f'<span style="line-height: 1.4">{note}</span>', layout=widgets.Layout(flex="1 1 0"))
            rows.append(widgets.HBox([box, text], layout=widgets.Layout(align_items="center", width="100%")))
        folded = widgets.Accordion([widgets.VBox(rows)], selected_index=None)

        def count(_: Any = None) -> None:
            on = sum(box.value for box in self.quirks.values())
            folded.set_title(0, f"Quirks of the released code: {on} of {len(self.quirks)} on")

        for box in self.quirks.values():
            box.observe(count, "value")
        count()
        return [folded]
