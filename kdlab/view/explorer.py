"""The explorer: teacher, student, their difference and a method's loss side by side, for JupyterLab.

State goes one way: a control or the canvas changes -> `Wanted` says what is to be shown -> `Album` has it or makes it
in the background -> the canvas is sent what is new.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from ipywidgets import jslink

from kdlab.data.nuscenes import NuScenesDataset
from kdlab.distill import Method
from kdlab.view.sight import ALL, Frames, Observer, Sight, load_sights
from kdlab.view.widgets.album import Album, Wanted, sizes
from kdlab.view.widgets.background import Background, Job, in_words
from kdlab.view.widgets.canvas import Canvas
from kdlab.view.widgets.controls import Controls, shown_by
from kdlab.view.widgets.readout import cell_html

PACE = 0.5
"""Seconds from frame to frame while playing: nuScenes' keyframes in real time."""

UNSEEN = 30
"""Updates that a page may leave undrawn before playing stops: nobody sees it, the cell was run again or the tab is
hidden."""

KEYS = {"[": -1, "pageup": -1, "]": 1, "pagedown": 1}
"""Frames that a key steps."""

ASK = "<i>Click a cell of a map to see what feeds it, what lies in it and what each term says there.</i>"


class BEVExplorer(Controls):
    """See what distillation does, frame by frame and cell by cell. The last line of a notebook cell shows it.

    Networks run once per frame, in a thread of their own; everything stays usable meanwhile, and only what was asked
    for last is drawn. The values of the controls may be set from Python as well, see `Controls`.

    Args:
        data: a folder in the nuScenes format, an opened data set, `Frames`; or stored features: what `save_sights`
            wrote or `load_sights` read.
        teacher: run folder or shipped weights; left out: the one that the student's run names, where it is there.
        student: likewise; may be left out beside a teacher.
        method: a name, several with + between them, or a method; left out: what the student was trained with.
        split: of a folder; left out: the validation split of the run.
        quirks: of the method, to flip at the start.

    Attributes:
        canvas: the maps and images.
        album: the frames and what is drawn of them.
        widget: all of it as one ipywidget.

    Raises:
        FileNotFoundError: no such data set or run.
        ValueError: networks were named for sights that hold their own, or none for data that hold none; unknown split,
            method or quirk.
    """

    def __init__(
        self,
        data: Path | str | NuScenesDataset | Sequence[Sight],
        teacher: Path | str | None = None,
        student: Path | str | None = None,
        method: str | Method | None = None,
        *,
        split: str | None = None,
        quirks: Collection[str] = (),
    ) -> None:
        sights = _sights(data, teacher, student, method, split, quirks)
        self.album = Album(sights)
        observer = self.album.observer
        compared = observer.method if observer is not None else None
        self._given = compared.on if compared is not None else frozenset()
        known = compared.quirks if compared is not None else ()
        super().__init__(len(sights), known, self._given, _fixed(observer))
        self.heading.value = _heading(sights, data, teacher, student, observer)
        self.report.value = ASK
        self.canvas = Canvas()
        self.widget = self.lay_out(self.canvas)
        self._lock = threading.RLock()  # the page's messages and the background thread both draw
        self._filling = False
        self._shown: Wanted | None = None
        self._wanted = Wanted(0)
        self._background = Background(self._failed)
        self._link()
        self._ask(force=True)

    def _repr_mimebundle_(self, **_: Any) -> Mapping[str, Any]:
        """What notebooks show."""
        found: Mapping[str, Any] = self.widget._repr_mimebundle_()
        return found

    def wait(self, seconds: float = 60.0) -> bool:
        """Wait until all that was asked for is drawn; whether that was reached. Playing does not end by itself."""
        return self._background.wait(seconds)

    def step(self, frames: int) -> None:
        """Go some frames on or back, around the ends."""
        self.frame.value = (self.frame.value + frames) % len(self.album)

    def _link(self) -> None:
        """Tie controls and canvas together; thresholds in the page itself, without Python."""
        thresholds = ((self.min_score, "min_score"), (self.mask_threshold, "mask_threshold"))
        self._links = [jslink((control, "value"), (self.canvas, name)) for control, name in thresholds]
        deciding = (self.frame, self.stage, self.view, self.channel, self.term, self.what, self.mask)
        for control in (*deciding, self.show_similarity, *self.quirks.values()):
            control.observe(self._changed, "value")
        for control in (self.show_boxes, self.show_points, self.show_mask, self.show_cameras):
            control.observe(self._toggled, "value")
        self.canvas.observe(self._changed, "cell")
        self.canvas.observe(self._pressed, "key")
        self.play.observe(self._played, "value")
        self.back.on_click(lambda _: self.step(-1))
        self.forward.on_click(lambda _: self.step(1))
        self._toggled()

    def _changed(self, _: Any) -> None:
        self._ask()

    def _toggled(self, _: Any = None) -> None:
        with self._lock:
            self.canvas.show = shown_by(self)

    def _pressed(self, change: Any) -> None:
        key = change["new"].rpartition(":")[0]
        if key == "space":
            self.play.value = not self.play.value
        elif key in KEYS:
            self.step(KEYS[key])

    def _played(self, change: Any) -> None:
        self.play.icon, self.play.description = ("pause", "stop") if change["new"] else ("play", "play")
        self._ask(force=True)

    def _read(self) -> Wanted:
        """What the controls say."""
        on = frozenset(name for name, box in self.quirks.items() if box.value)
        cell = self.canvas.cell
        return Wanted(
            self.frame.value,
            None if on == self._given else on,
            self.stage.value,
            self.channel.value if self.view.value == "channel" else self.view.value,
            self.term.value or "",
            self.what.value,
            self.mask.value or "",
            (int(cell[0]), int(cell[1])) if len(cell) == 2 else None,
            self.show_similarity.value,
        )

    def _ask(self, force: bool = False) -> None:
        """Show what the controls say: at once where it is there, else as soon as it is made."""
        with self._lock:
            if self._filling:
                return
            wanted = self._read()
            if wanted == self._wanted and not force:
                return
            self._wanted = wanted
            try:
                missing = self.album.missing(wanted)
                if missing:
                    self.canvas.status = missing
                else:
                    self._draw(wanted)
            except Exception as error:
                self._failed(error)
            wanted = self._wanted  # what was picked may have changed with what this frame offers
        self._background.ask(self._work(wanted))

    def _work(self, wanted: Wanted) -> Job:
        """What takes long: make what is missing and draw it; then the cell's gradients; then the next frame."""
        for message in self.album.prepare(wanted):
            self._say(message)
            yield
        if self._shown != wanted:
            self.album.warm(wanted)
            wanted = self._draw(wanted)
        drawn = time.monotonic()
        if wanted.cell is not None and not self.play.value:
            before = set(self.album.sight(wanted).gradients)
            for message in self.album.gradients(wanted):
                self._say(message)
                yield
            if before != set(self.album.sight(wanted).gradients):
                self._draw(wanted)
        for frames in (1,) if self.play.value else (1, -1):
            yield from self._foresee(replace(wanted, index=(wanted.index + frames) % len(self.album)))
        while self.play.value and len(self.album) > 1:
            if self.canvas.serial - self.canvas.shown > UNSEEN:
                self.play.value = False
            elif time.monotonic() - drawn >= PACE:
                self.step(1)
            time.sleep(0.02)
            yield

    def _foresee(self, wanted: Wanted) -> Job:
        """Make a frame that is likely to be asked for next."""
        try:
            for _ in self.album.prepare(wanted):
                yield
            self.album.warm(wanted)
        except Exception:
            return  # it is told when somebody asks for that frame

    def _say(self, message: str) -> None:
        with self._lock:
            self.canvas.status = message

    def _failed(self, error: Exception) -> None:
        """Tell in the widget what went wrong; maps of another frame would be taken for this one's."""
        with self._lock:
            self._shown = None
            self.play.value = False
            status = f"Frame {self._wanted.index} cannot be shown. {in_words(error)}"
            self.canvas.draw(panels=[], pictures=[], boxes={}, points=b"", mask=b"", pixels=[], status=status)
            self.report.value, self.place.value = "", f"of {len(self.album)}"

    def _draw(self, wanted: Wanted) -> Wanted:
        """Send the canvas what is new, if it is still what is wanted; returns it as far as the frame has it."""
        with self._lock:
            if wanted != self._wanted:
                return wanted
            sight = self.album.sight(wanted)
            wanted = self._fill(sight, wanted)
            panels, notes = self.album.panels(wanted)
            pixels, report = self._inspected(sight, wanted)
            self.canvas.draw(
                panels=panels,
                mask=self.album.mask(wanted),
                pixels=pixels,
                status="; ".join(notes),
                **self.album.scene(wanted.index),
            )
            self.report.value, self.place.value = report, self._place(sight)  # the maps do not wait for the words
            self._wanted = self._shown = wanted
            return wanted

    def _inspected(self, sight: Sight, wanted: Wanted) -> tuple[list[list[float]], str]:
        """Pixels to mark on the images, and the report of the picked cell."""
        report = self.album.report(wanted)
        if report is None:
            return [], ASK
        pixels = [[p.camera, p.u, p.v, p.weight] for p in report.pixels]
        pending = sight.live is not None or sight.again is not None
        return pixels, cell_html(report, wanted.stage, pending)

    def _fill(self, sight: Sight, wanted: Wanted) -> Wanted:
        """Offer what this frame has; what was picked stays where it is still there."""
        self._filling = True
        try:
            _offer(self.stage, _stage_options(sight))
            _offer(self.term, self._term_options(sight))
            masks = [(name, name) for name in self.album.masks(wanted)]
            _offer(self.mask, masks or [("none", "")])
            widths = [size[0] for size in sizes(sight, self._read().stage).values()]
            self.channel.max = max(widths, default=1) - 1
            self.channel.disabled = self.view.value != "channel"
            self.channel.layout.display = None if self.view.value == "channel" else "none"
            return self._read()
        finally:
            self._filling = False

    def _term_options(self, sight: Sight) -> list[tuple[str, str]]:
        """The method's terms; those that this pair cannot have say why when picked."""
        asked = self.album.observer.asked if self.album.observer is not None else None
        lacking = [t.name for t in asked.terms if t.name in sight.errors] if asked is not None else []
        terms = [*((name, name) for name in sight.results), *((f"{name} (not here)", name) for name in lacking)]
        return [("all terms", ALL), *terms] if terms else [("none", "")]

    def _place(self, sight: Sight) -> str:
        boxes = int(sight.sample.boxes.valid.sum())
        total, points = len(self.album), len(sight.sample.points)
        return f"of {total} · scene {escape(sight.sample.scene)} · {boxes} boxes · {points} points"


def _offer(picker: Any, options: list[tuple[str, str]]) -> None:
    """Set a picker's options where they changed, and keep what is picked where it is among them."""
    if list(picker.options) == options:
        return
    before = picker.value
    picker.options = options
    values = [value for _, value in options]
    picker.value = before if before in values else values[0]


def _stage_options(sight: Sight) -> list[tuple[str, str]]:
    """Every stage that teacher or student has; one that only one of them has says so."""
    sides = {side: stages for side, stages in sight.stages().items() if side != "labels"}
    names = dict.fromkeys(name for stages in sides.values() for name in stages)

    def label(name: str) -> str:
        have = [side for side, stages in sides.items() if name in stages]
        return name if len(have) == len(sides) else f"{name} ({have[0]} only)"

    return [(label(name), name) for name in names]


def _fixed(observer: Observer | None) -> dict[str, str]:
    """Quirks that a switch cannot change, with the reason: they are built into the student."""
    if observer is None or observer.method is None or observer.student is None:
        return {}
    return {
        q.name: f"{q.what} (built into the student: train another to switch it)"
        for q in observer.method.quirks
        if q.student is not None
    }


def _sights(
    data: Path | str | NuScenesDataset | Sequence[Sight],
    teacher: Path | str | None,
    student: Path | str | None,
    method: str | Method | None,
    split: str | None,
    quirks: Collection[str],
) -> Sequence[Sight]:
    """Frames of the data as the networks see them; errors as `BEVExplorer`."""
    if isinstance(data, str | Path) and not Path(data).exists():
        raise FileNotFoundError(f"BEVExplorer: there is no {data}; give the folder of a data set, or a file of sights")
    if isinstance(data, str | Path) and Path(data).is_file():
        data = load_sights(data)
    if not isinstance(data, str | Path | NuScenesDataset):
        if any(v is not None for v in (teacher, student, method, split)) or quirks:
            raise ValueError("BEVExplorer: these sights hold networks and method already; give the sights alone")
        if not hasattr(data, "__len__") or not len(data):
            raise ValueError("BEVExplorer: there are no sights in what was given")
        if not isinstance(data, Frames) and not isinstance(data[0], Sight):
            raise ValueError(f"BEVExplorer: needs sights, got {type(data[0]).__name__}; an Observer makes them")
        return data
    if teacher is None and student is None:
        raise ValueError("BEVExplorer: name a student's run, a teacher's, or both; or give sights instead of data")
    observer = Observer.of_runs(student, teacher, method, quirks=quirks)
    if isinstance(data, NuScenesDataset):
        found = observer.dataset(data.root, split or data.split, data.version)
    else:
        found = observer.dataset(data, split or observer.config.data.val or None)
    if not len(found):
        known = ", ".join(sorted(name for name, scenes in found.tables.split_scenes.items() if scenes))
        raise ValueError(f"BEVExplorer: split {found.split} of {found.root} is empty; give split= one of {known}")
    return Frames(found, observer)


def _heading(
    sights: Sequence[Sight],
    data: Any,
    teacher: Path | str | None,
    student: Path | str | None,
    observer: Observer | None,
) -> str:
    """Names data, teacher, student and method."""
    source = getattr(sights, "dataset", data)
    if isinstance(source, NuScenesDataset):
        where = f"{source.root.resolve().name}, {source.split or 'all keyframes'}"
    else:
        where = f"{len(sights)} frames" if observer is not None else f"{len(sights)} stored frames"
    parts = [("data", where)]
    if observer is None:
        first = sights[0]
        parts += [(side, "stored" if side in first.features else "none") for side in ("teacher", "student")]
        parts.append(("method", f"{len(first.results)} stored terms" if first.results else "none"))
    else:
        for side, run in (("teacher", teacher), ("student", student)):
            network = getattr(observer, side)
            known = [] if network is None else [_run_name(run), network.config.modality]
            parts.append((side, ", ".join(dict.fromkeys(filter(None, known))) or "none"))
        parts.append(("method", observer.method.name if observer.method is not None else "none"))
    style = "margin-right: 22px; white-space: nowrap"
    words = " ".join(f'<span style="{style}">{name} <b>{escape(text)}</b></span>' for name, text in parts)
    notes = "".join(f"<div>{escape(note)}</div>" for note in _notes(observer))
    return f'<div style="font-size: 14px; line-height: 1.5">{words}</div>{notes}'


def _notes(observer: Observer | None) -> list[str]:
    """What a viewer should know about networks and method."""
    if observer is None:
        return []
    whole = observer.asked.name if observer.asked is not None else ""
    return [*observer.notes, *(text for name, text in observer.errors.items() if name == whole)]


def _run_name(run: Path | str | None) -> str:
    """A run folder's name, without the digest of the data that shipped weights carry."""
    return re.sub(r"-[0-9a-f]{16}$", "", Path(run).resolve().name) if run is not None else ""
