"""What may be changed in a keyframe of the simulated world."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from kdlab.data.simulate_config import CAMERAS, Array, Rig
from kdlab.data.simulate_layout import KERB, KERBSTONE, PAVING
from kdlab.data.simulate_world import Agent, SceneState

Move = tuple[float, float, float]


@dataclass(frozen=True)
class Changes:
    """What is other than in the data set; None leaves a setting as it is.

    Attributes:
        moved: agent -> (dx, dy, turn): metres in the key ego frame and radians. Its whole path moves along, turned
            about where it is in the keyframe, so that past sweeps and frames and its velocity fit.
        removed: agents that are not there.
        beams: of the LiDAR, 2 to 128, spread over the same angles.
        dropout: share of LiDAR returns lost at random, 0 to 0.95.
        fog: density, 0 to 1. night: 0 is daylight, 1 night. See `SimulationConfig`.
        calibration: camera -> (yaw, pitch, roll) in degrees: the error of its written calibration, which says that the
            camera looks farther left, up, and is turned clockwise. Images stay as they are.
    """

    moved: Mapping[int, Move] = field(default_factory=dict)
    removed: frozenset[int] = frozenset()
    beams: int | None = None
    dropout: float | None = None
    fog: float | None = None
    night: float | None = None
    calibration: Mapping[str, Move] = field(default_factory=dict)

    @property
    def arrangement(self) -> Hashable:
        """Equal where all objects stand in the same places."""
        return tuple(sorted((k, tuple(v)) for k, v in self.moved.items() if any(v))), self.removed

    @property
    def cloud(self) -> Hashable:
        """Equal where the LiDAR sees the same."""
        return self.arrangement, self.beams, self.dropout, self.fog

    @property
    def light(self) -> Hashable:
        """Equal where the cameras see the same."""
        return self.arrangement, self.fog, self.night

    def check(self, agents: Collection[int]) -> None:
        """Raise ValueError for an agent that is not among these, an unknown camera, or a value out of range."""
        unknown = sorted((set(self.moved) | self.removed) - set(agents))
        if unknown:
            raise ValueError(f"no agent {unknown[0]} in this keyframe; there are {sorted(agents)}")
        cameras = sorted(set(self.calibration) - set(CAMERAS))
        if cameras:
            raise ValueError(f"no camera {cameras[0]!r}; the cameras are {', '.join(CAMERAS)}")
        if self.beams is not None and not 2 <= self.beams <= 128:
            raise ValueError(f"beams must be between 2 and 128, got {self.beams}")
        for name, most in (("dropout", 0.95), ("fog", 1.0), ("night", 1.0)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise ValueError(f"{name} must be between 0 and {most}, got {value}")

    def placed(self, agent: Agent, listed: Mapping[int, Agent], key: SceneState) -> Agent:
        """An agent where its move puts it.

        Args:
            agent: at any time.
            listed: the agents of the unchanged keyframe.
            key: the scene whose ego frame is the key frame.
        """
        dx, dy, turn = self.moved.get(agent.index, (0.0, 0.0, 0.0))
        if dx == dy == turn == 0:
            return agent
        centre = listed[agent.index]
        shift = key.ego_pose[:2, :2] @ (dx, dy)
        c, s = math.cos(turn), math.sin(turn)
        px, py = agent.x - centre.x, agent.y - centre.y
        x, y = centre.x + shift[0] + c * px - s * py, centre.y + shift[1] + s * px + c * py
        label = key.layout.label(np.array([agent.x, x]), np.array([agent.y, y]))
        old, new = np.isin(label, (PAVING, KERBSTONE)) * KERB  # Pavements lie higher than the road.
        return replace(
            agent,
            x=float(x),
            y=float(y),
            z=float(agent.z + new - old),
            yaw=agent.yaw + turn,
            vx=c * agent.vx - s * agent.vy,
            vy=s * agent.vx + c * agent.vy,
        )

    def written(self, rig: Rig) -> Rig:
        """A written calibration with the errors on it."""
        rig = dict(rig)
        for name, angles in self.calibration.items():
            pose = rig[name].ego_from_sensor.copy()
            pose[:3, :3] = pose[:3, :3] @ _camera_turn(*np.radians(angles))
            rig[name] = replace(rig[name], ego_from_sensor=pose)
        return rig


def _camera_turn(yaw: float, pitch: float, roll: float) -> Array:
    """Rotation [3, 3] in a camera's axes (x right, y down, z ahead) to the left, up and clockwise, radians."""
    (cy, sy), (cp, sp), (cr, sr) = ((math.cos(a), math.sin(a)) for a in (yaw, pitch, roll))
    left = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
    up = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    turn: Array = left @ up @ np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return turn
