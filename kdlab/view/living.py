"""The living scene: change the simulated world and watch what teacher and student make of it, for JupyterLab.

State goes one way: a control or the canvas changes -> `changes` says what the world is to be -> a background thread
renders it and runs the networks -> the canvas is sent what they saw. The newest change wins.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ipywidgets import jslink

from kdlab.data.nuscenes import NuScenesDataset
from kdlab.data.simulate_changes import Changes, Move
from kdlab.data.simulate_live import LiveWorld
from kdlab.distill import Method
from kdlab.view.sight import Observer, Sight
from kdlab.view.sight.before_after import find, maps_of, nearest
from kdlab.view.sight.layers import View, mask_layers
from kdlab.view.widgets.album import sizes
from kdlab.view.widgets.background import Background, Job, in_words
from kdlab.view.widgets.canvas import Canvas, box_set, boxes_of, mask_bytes, panel_of, pictures_of, points_of
from kdlab.view.widgets.controls import shown_by
from kdlab.view.widgets.living_controls import PUSHES, LivingControls
from kdlab.view.widgets.living_words import heading_of, objects_of, place_html, report_html

REST = 0.1
"""Seconds that controls must rest before the world is rendered: a slider in motion only moves the outline."""

STILL: Move = (0.0, 0.0, 0.0)


class LivingScene(LivingControls):
    """Change the simulated world and watch both networks. The last line of a notebook cell shows it.

    Drag or pick an object, move, turn or remove it; thin the LiDAR; add fog or night; shift a camera's calibration.
    The values of the controls may be set from Python as well, see `LivingControls`.

    Args:
        world: a keyframe of a simulated world, or the folder of a simulated data set.
        teacher: run folder or shipped weights; left out: the one that the student's run names, where it is there.
        student: likewise; may be left out beside a teacher.
        method: a name, several with + between them, or a method; left out: what the student was trained with.
        token: of the sample, where the world is a folder; left out: its first sample.
        quirks: of the method, to flip.
        observer: networks and method that are there already, instead of teacher, student and method.

    Attributes:
        canvas: the maps and images.
        world: the keyframe.
        before: what the networks see of the unchanged world; None until they have.
        sight: what they see now.
        seconds: how long the last change took: "world", "networks", "maps".
        widget: all of it as one ipywidget.

    Raises:
        FileNotFoundError: no such data set or run.
        ValueError: no networks, no simulated world, or one of other sweeps or frames than the networks see; unknown
            method, quirk or sample.
    """

    def __init__(
        self,
        world: LiveWorld | Path | str,
        teacher: Path | str | None = None,
        student: Path | str | None = None,
        method: str | Method | None = None,
        *,
        token: str | None = None,
        quirks: Collection[str] = (),
        observer: Observer | None = None,
    ) -> None:
        if observer is None and teacher is None and student is None:
            raise ValueError("LivingScene: name a student's run, a teacher's, or both")
        self.observer = observer or Observer.of_runs(student, teacher, method, quirks=quirks)
        self.world = _world(world, token, self.observer)
        self._names = {agent: name.replace("_", " ") for agent, name, _ in self.world.agents}
        objects = objects_of(self.world, self.observer.grid)
        super().__init__(self.world.config, objects)
        self._within = [agent for _, agent in objects]
        self._moved: dict[int, Move] = {}
        self._removed: set[int] = set()
        self._shifted: dict[str, Move] = {}
        self.before: Sight | None = None
        self.sight: Sight | None = None
        self._drawn = Changes()
        self.seconds: dict[str, float] = {}
        self.heading.value = heading_of(self.world, self.observer)
        self.canvas = Canvas.over(self.observer.grid, editable=True)
        self.widget = self.lay_out(self.canvas)
        self._lock = threading.RLock()  # the page's messages and the background thread both draw
        self._quiet = False
        self._background = Background(self._failed)
        self._link()
        self._pick_first()
        self._ask()

    def _repr_mimebundle_(self, **_: Any) -> Mapping[str, Any]:
        """What notebooks show."""
        return dict(self.widget._repr_mimebundle_())

    def wait(self, seconds: float = 60.0) -> bool:
        """Wait until the newest change is drawn; whether that was reached."""
        return self._background.wait(seconds)

    @property
    def changes(self) -> Changes:
        """What the controls say."""
        config = self.world.config

        def other(control: Any, usual: float) -> Any:
            return None if math.isclose(control.value, usual, abs_tol=1e-6) else control.value

        return Changes(
            moved=dict(self._moved),
            removed=frozenset(self._removed),
            beams=other(self.beams, config.lidar_beams),
            dropout=other(self.dropout, config.lidar_dropout),
            fog=other(self.fog, config.fog),
            night=other(self.night, config.night),
            calibration=dict(self._shifted),
        )

    def put_back(self, agent: int) -> None:
        """Undo all that was done to an object."""
        self._moved.pop(agent, None)
        self._removed.discard(agent)
        self._show_object()
        self._ask()

    def reset_all(self) -> None:
        """The world as it was."""
        config = self.world.config
        self._moved, self._removed, self._shifted = {}, set(), {}
        with self._silent():
            self.beams.value, self.dropout.value = config.lidar_beams, config.lidar_dropout
            self.fog.value, self.night.value = config.fog, config.night
        self._show_object()
        self._show_camera()
        self._ask()

    # What controls and canvas say -----------------------------------------------------------------------------------

    def _link(self) -> None:
        """Tie controls and canvas together; thresholds in the page itself, without Python."""
        jslink((self.min_score, "value"), (self.canvas, "min_score"))
        jslink((self.mask_threshold, "value"), (self.canvas, "mask_threshold"))
        for control in (self.ahead, self.left, self.turn, self.remove):
            control.observe(self._object_changed, "value")
        for control in (self.yaw, self.pitch, self.roll):
            control.observe(self._camera_changed, "value")
        for control in (self.beams, self.dropout, self.fog, self.night):
            control.observe(lambda _: self._ask(), "value")
        for control in (self.stage, self.view, self.channel, self.compare, self.mask):
            control.observe(lambda _: self._redraw(), "value")
        for control in (self.show_boxes, self.show_points, self.show_mask, self.show_cameras):
            control.observe(self._toggled, "value")
        self.object.observe(self._picked, "value")
        self.camera.observe(lambda _: self._show_camera(), "value")
        self.back.on_click(lambda _: self.put_back(self.object.value))
        self.reset.on_click(lambda _: self.reset_all())
        self.canvas.observe(self._clicked, "cell")
        self.canvas.observe(self._dragged, "dragged")
        self.canvas.observe(self._pressed, "key")
        self._toggled()

    @contextmanager
    def _silent(self) -> Iterator[None]:
        """Set controls without being told of it."""
        with self._lock:
            before, self._quiet = self._quiet, True
            try:
                yield
            finally:
                self._quiet = before

    def _told(self) -> bool:
        """Whether a control was set from outside; waits while another thread sets some."""
        with self._lock:
            return not self._quiet

    def _toggled(self, _: Any = None) -> None:
        with self._lock:
            self.canvas.show = shown_by(self)

    def _object_changed(self, _: Any) -> None:
        agent = self.object.value
        if not self._told() or agent is None:
            return
        move = (self.ahead.value, self.left.value, math.radians(self.turn.value))
        self._moved = {**{k: v for k, v in self._moved.items() if k != agent}, **({agent: move} if any(move) else {})}
        self._removed = self._removed | {agent} if self.remove.value else self._removed - {agent}
        self.remove.description = "bring back" if self.remove.value else "remove"
        self._ask()

    def _camera_changed(self, _: Any) -> None:
        if self._told():
            angles = (self.yaw.value, self.pitch.value, self.roll.value)
            rest = {k: v for k, v in self._shifted.items() if k != self.camera.value}
            self._shifted = {**rest, self.camera.value: angles} if any(angles) else rest
            self._ask()

    def _picked(self, _: Any) -> None:
        if self._told():
            self._show_object()
            self._outline()
            self._report()

    def _show_object(self) -> None:
        """Set the sliders to what was done to the picked object."""
        agent = self.object.value
        ahead, left, turn = self._moved.get(agent, STILL)
        with self._silent():
            self.show_move(ahead, left, math.degrees(turn))
            self.remove.value = agent in self._removed
            self.remove.description = "bring back" if self.remove.value else "remove"

    def _show_camera(self) -> None:
        """Set the sliders to the picked camera's error."""
        with self._silent():
            self.yaw.value, self.pitch.value, self.roll.value = self._shifted.get(self.camera.value, STILL)

    def _pick_first(self) -> None:
        """Begin with the nearest car, else with what is nearest."""
        cars = [agent for agent in self._within if self._names[agent] == "car"]
        with self._silent():
            self.object.value = next(iter(cars or self._within), None)

    def _at(self, x: float, y: float) -> int | None:
        """The object at a place, where the changes put it."""
        reach = max(2.0, 0.75 * self.observer.grid.cell)  # a click gives a cell, which may be a coarse one
        index = nearest(self.world.boxes(self.changes), x, y, reach)
        agent = None if index is None else self.world.agents[index][0]
        return agent if agent in self._within else None

    def _clicked(self, change: Any) -> None:
        cell = change["new"]
        if len(cell) == 2:
            grid = self.observer.grid
            x, y = (low + (k + 0.5) * grid.cell for low, k in ((grid.x[0], cell[1]), (grid.y[0], cell[0])))
            agent = self._at(x, y)
            if agent is not None:
                self.object.value = agent

    def _dragged(self, change: Any) -> None:
        if len(change["new"]) != 4:
            return
        x0, y0, x1, y1 = change["new"]
        agent = self._at(x0, y0)
        if agent is None:
            self.canvas.status = "Nothing to move there: begin the drag on an object."
            return
        self.object.value = agent
        self._push(x1 - x0, y1 - y0, 0.0)

    def _pressed(self, change: Any) -> None:
        key = change["new"].rpartition(":")[0]
        if key in PUSHES:
            self._push(*PUSHES[key])
        elif key == "x":
            self.remove.value = not self.remove.value
        elif key == "r":
            self.reset_all()

    def _push(self, ahead: float, left: float, turn: float) -> None:
        """Move the picked object on, by metres and degrees."""
        with self._silent():
            self.show_move(self.ahead.value + ahead, self.left.value + left, self.turn.value + turn)
        self._object_changed(None)

    # Rendering and drawing ------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Show what the controls say as soon as it is made."""
        if self._told():
            self._outline()
            self._background.ask(self._work(self.changes))

    def _work(self, changes: Changes) -> Job:
        """What takes long."""
        asked = time.monotonic()
        while self.sight is not None and time.monotonic() - asked < REST:
            time.sleep(0.02)
            yield
        if self.before is None:
            self._say("rendering the world and running the networks …")
            self.before = self.observer.see(self.world.sample())
            self.before.drop_graph()
            self._fill(self.before)
            yield
        self._say("rendering the changed world …")
        began = time.monotonic()
        sample = self.world.sample(changes)
        yield
        self._say("running the networks …")
        rendered = time.monotonic()
        sight = self.before if changes == Changes() else self.observer.see(sample)
        sight.drop_graph()
        seen = time.monotonic()
        yield
        with self._lock:
            self.sight, self._drawn = sight, changes
            self._draw(whole=True)
            drawn = time.monotonic()
            self.seconds = {"world": rendered - began, "networks": seen - rendered, "maps": drawn - seen}
            self.place.value = place_html(changes, self._names, self.seconds)

    def _fill(self, sight: Sight) -> None:
        """Offer what the networks and the method have."""
        sides = [stages for side, stages in sight.stages().items() if side != "labels"]
        with self._silent():
            self.stage.options = list(dict.fromkeys(name for stages in sides for name in stages))
            self.stage.value = "bev"
            self.mask.options = [(name, name) for name in mask_layers(sight)]

    def _redraw(self) -> None:
        if self.sight is not None and self._told():
            try:
                self._draw(whole=False)
            except ValueError as error:
                self._failed(error)

    def _draw(self, whole: bool) -> None:
        """Send the canvas the maps, and where the world is another one, images, points and boxes too."""
        with self._lock:
            assert self.sight is not None and self.before is not None
            view = self._view(self.sight)
            layers, notes = maps_of(self.before, self.sight, self.stage.value, view, self.compare.value)
            mask = mask_layers(self.sight).get(self.mask.value or "")
            traits: dict[str, Any] = {
                "panels": [panel_of(layer) for layer in layers],
                "mask": b"" if mask is None else mask_bytes(mask.values),
                "status": "; ".join(notes),
            }
            if whole:
                sample = self.sight.sample
                traits |= {"pictures": pictures_of(sample), "points": points_of(sample.points)}
                traits["boxes"] = boxes_of(self.sight) | self._outlined()
            self._report()
            self.canvas.draw(**traits)

    def _view(self, sight: Sight) -> View:
        """How channels become a picture; the channel slider follows the stage."""
        one = self.view.value == "channel"
        with self._silent():
            self.channel.layout.display = None if one else "none"
            self.channel.max = max((size[0] for size in sizes(sight, self.stage.value).values()), default=1) - 1
        return int(self.channel.value) if one else self.view.value

    def _outlined(self) -> dict[str, Any]:
        """The picked object's outline as a set of boxes."""
        agent = self.object.value
        if agent is None:
            return {}
        sample = self.sight.sample if self.sight is not None else None
        return {"picked": box_set("picked", self.world.box_of(agent, self.changes), sample)}

    def _outline(self) -> None:
        """Move the picked object's outline at once; all else follows."""
        if self.sight is not None:
            with self._lock:
                self.canvas.draw(boxes={k: v for k, v in self.canvas.boxes.items() if k != "picked"} | self._outlined())

    def _report(self) -> None:
        """Tell what the networks make of the picked object, before and now."""
        agent = self.object.value
        if agent is None or self.sight is None or self.before is None:
            return
        here, stage = self.world.box_of(agent, self._drawn), self.stage.value
        findings = find(self.before, self.world.box_of(agent), stage), find(self.sight, here, stage)
        name, gone = f"{self._names[agent]} #{agent}", agent in self._drawn.removed
        self.report.value = report_html(name, here, gone, *findings)

    def _say(self, message: str) -> None:
        with self._lock:
            self.canvas.status = message

    def _failed(self, error: Exception) -> None:
        """Tell in the widget what went wrong."""
        self._say(f"Not drawn, the maps show what was before. {in_words(error)}")


def _world(world: LiveWorld | Path | str, token: str | None, observer: Observer) -> LiveWorld:
    """The keyframe, with as many sweeps and frames as the networks see; errors as `LivingScene`."""
    sweeps, frames = observer.sensors.sweeps, observer.sensors.frames
    if not isinstance(world, LiveWorld):
        token = token or NuScenesDataset(world, images=False, points=False).tokens[0]
        return LiveWorld.of_data(world, token, sweeps=sweeps, frames=frames)
    if (world.sweeps, world.frames) != (sweeps, frames):
        raise ValueError(
            f"LivingScene: these networks see {sweeps} sweeps and {frames} frames, the world gives {world.sweeps} and "
            f"{world.frames}; make it with LiveWorld(..., sweeps={sweeps}, frames={frames})"
        )
    return world
