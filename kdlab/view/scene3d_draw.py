"""Open3D's own drawing, in a process of its own.

Where the graphics driver is missing, Open3D may end its process without an exception, and it writes to the terminal.
So the geometry goes through a folder to a child, and a notebook's kernel neither dies nor sees that text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CURE = "on Debian or Ubuntu: apt-get install libegl1 libvulkan1 mesa-vulkan-drivers"
POINT, LINE = 2.5, 2.5  # pixels


@dataclass(frozen=True)
class Look:
    """From where a picture is taken, and how large it is.

    Attributes:
        eye: the camera's place, metres in the key ego frame.
        target: the point in the middle of the picture.
        size: width and height, pixels.
        field: vertical opening, degrees.
    """

    eye: tuple[float, float, float]
    target: tuple[float, float, float]
    size: tuple[int, int]
    field: float = 50.0


def draw(cloud: Any, lines: Mapping[str, Any], look: Look, window: bool = False) -> bytes:
    """A PNG of Open3D geometry, or nothing (after the window was closed) where a window is asked for.

    Args:
        cloud: an Open3D point cloud with colours.
        lines: Open3D line sets by name.
        look: the camera.
        window: open a window and wait until it is closed.

    Raises:
        RuntimeError: no screen for the window, or a library that Open3D needs is missing; says the cure.
    """
    import open3d as o3d

    if window and sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise RuntimeError("a window needs a screen, and DISPLAY names none; scene_png draws without one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        o3d.io.write_point_cloud(folder / "points.ply", cloud)
        drawn = {name: f"lines{k}.ply" for k, (name, one) in enumerate(lines.items()) if len(one.lines)}
        for title, file in drawn.items():
            o3d.io.write_line_set(folder / file, lines[title])
        (folder / "scene.json").write_text(json.dumps({**asdict(look), "lines": drawn, "window": window}))
        done = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).resolve()), name],
            capture_output=True,
            text=True,
            errors="replace",
        )
        picture = folder / "scene.png"
        if done.returncode or not (window or picture.is_file()):
            raise RuntimeError(f"Open3D cannot draw here ({_reason(done)}); {CURE}")
        return b"" if window else picture.read_bytes()


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The line of the child's last words that says what is missing."""
    words = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    telling = [line for line in words if line.startswith(("reason:", "RuntimeError:")) or "EGL" in line]
    return (telling or words or [f"it ended with code {done.returncode}"])[-1]


def _material(shader: str) -> Any:
    from open3d.visualization import rendering

    made = rendering.MaterialRecord()
    made.shader, made.point_size, made.line_width = shader, POINT, LINE
    return made


def main(folder: Path) -> None:
    """Draw what lies in the folder into scene.png, or in a window."""
    import open3d as o3d
    from open3d.visualization import rendering

    asked = json.loads((folder / "scene.json").read_text())
    parts: dict[str, Any] = {"points": (o3d.io.read_point_cloud(folder / "points.ply"), _material("defaultUnlit"))}
    for name, file in asked["lines"].items():
        parts[name] = (o3d.io.read_line_set(folder / file), _material("unlitLine"))
    width, height = asked["size"]
    look = {"lookat": asked["target"], "eye": asked["eye"], "up": [0.0, 0.0, 1.0], "field_of_view": asked["field"]}
    if asked["window"]:
        shown = [{"name": name, "geometry": one, "material": how} for name, (one, how) in parts.items()]
        o3d.visualization.draw(shown, "kdlab", width, height, show_skybox=False, bg_color=[1.0] * 4, **look)
        return
    renderer = rendering.OffscreenRenderer(width, height)
    renderer.scene.set_background([1.0] * 4)
    renderer.scene.view.set_post_processing(False)  # else the tone mapping changes the colours
    for name, (one, how) in parts.items():
        renderer.scene.add_geometry(name, one, how)
    renderer.setup_camera(look["field_of_view"], look["lookat"], look["eye"], look["up"])
    o3d.io.write_image(folder / "scene.png", renderer.render_to_image())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
