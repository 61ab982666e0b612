"""The files of a run folder: config, weights and the checkpoint that a killed run goes on from.

Files that a later process relies on are written whole under another name and then renamed: old or new, never half.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdlab.config import C, DetectorConfig, RunConfig, from_dict, save_config, to_dict
from kdlab.progress import in_notebook
from kdlab.sample import CLASSES

if TYPE_CHECKING:
    from kdlab.models.camera import CameraEncoder
    from kdlab.models.detector import Detector

_FREE = ("checkpoint_minutes", "evaluate_every", "gradients_every")
NEUTRAL = ("data.workers", "data.image_cache", "distill.cache", *(f"train.{key}" for key in _FREE))
"""Keys that may change when a run goes on: they do not change its numbers (a feature cache: beyond its tolerance)."""

EXPORTED_WEIGHTS = "model.safetensors"
"""What the Hugging Face hub calls a model's weights."""

EXPORT = "kdlab"
"""Key of an exported config.json (`kdlab.hub`) that a run's has not: version and classes."""

_UMASK = os.umask(0)
os.umask(_UMASK)


@dataclass(frozen=True)
class RunFolder:
    """Names of the files in a run folder.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The RunConfig, JSON."""
        return self.path / "config.json"

    @property
    def versions(self) -> Path:
        """What the run was made with, JSON."""
        return self.path / "versions.json"

    @property
    def losses(self) -> Path:
        """One row per step."""
        return self.path / "losses.csv"

    @property
    def gradients(self) -> Path:
        """How the losses' gradients agree, see `kdlab.gradients`."""
        return self.path / "gradients.csv"

    @property
    def cost(self) -> Path:
        """Time, memory and parameters, JSON, see `kdlab.cost`."""
        return self.path / "cost.json"

    @property
    def metrics(self) -> Path:
        """Metrics by split, JSON."""
        return self.path / "metrics.json"

    @property
    def validation(self) -> Path:
        """Metrics on the validation split by epoch, JSON."""
        return self.path / "validation.json"

    @property
    def weights(self) -> Path:
        """The trained detector; there once the run is finished. An exported run (`kdlab.hub`) has the hub's name."""
        exported = self.path / EXPORTED_WEIGHTS
        return exported if exported.exists() else self.path / "detector.safetensors"

    @property
    def distiller(self) -> Path:
        """The trained adapters of the distillation, for drawing its losses; no detector needs them."""
        return self.path / "distiller.safetensors"

    @property
    def checkpoint(self) -> Path:
        """State of an unfinished run."""
        return self.path / "checkpoint" / "state.pt"

    @property
    def finished(self) -> bool:
        """Whether the training has ended."""
        return self.weights.exists()

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that identify the weights, of a finished run."""
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()[:12]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to; the file takes the place of ``path`` when the block ends without an error, and not before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb") as written:
            os.fsync(written.fileno())
            os.fchmod(written.fileno(), 0o666 & ~_UMASK)  # safetensors writes files that only their owner may read
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all.

    Raises:
        ValueError: a number is not finite, which strict JSON cannot hold.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with replacing(path) as part:
        part.write_text(text)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    from importlib.metadata import version

    return {"kdlab": version("kdlab"), "torch": torch.__version__, "python": platform.python_version()}


def command() -> str:
    """The words that started this process, ready for a shell; ``notebook`` in one."""
    if in_notebook():
        return "notebook"
    program = Path(sys.argv[0])
    words = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join([*words, *sys.argv[1:]])


def write_versions(folder: RunFolder, made: Mapping[str, str]) -> None:
    """Store what a run is made with, or check that a run that goes on is made with the same.

    The command is the one that began the run; so is the camera start where it is not read again.

    Raises:
        ValueError: precision, teacher, camera start or data set are others than when the run was begun.
    """
    before = json.loads(folder.versions.read_text()) if folder.versions.exists() else {}
    kept = {key: before[key] for key in ("camera_start", "command") if key in before}
    made = {"command": command(), **kept, **made}
    for key, what in (
        ("precision", "precision"),
        ("teacher", "a teacher of digest"),
        ("camera_start", "a camera start of digest"),
        ("data", "a data set of digest"),
    ):
        if key in before and before[key] != made.get(key):
            raise ValueError(
                f"{folder.path} was begun with {what} {before[key][:12]}, which is {made.get(key, 'none')[:12]} now; "
                "give another --out"
            )
    write_json(folder.versions, made)


def differing_key(old: Any, new: Any, where: str = "") -> str | None:
    """Dotted name of the first key in which two JSON values differ, None where they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(k for k in old if k not in new)]:
            found = differing_key(old.get(key), new.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    return None if old == new else where


def deciding(config: RunConfig) -> dict[str, Any]:
    """Plain dictionary of a config without the `NEUTRAL` keys."""
    plain = to_dict(config)
    for dotted in NEUTRAL:
        section, key = dotted.split(".")
        if plain[section] is not None:
            del plain[section][key]
    return plain


def _value(plain: dict[str, Any], dotted: str) -> Any:
    value: Any = plain
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def open_run(folder: RunFolder, config: RunConfig) -> None:
    """Make the run folder of a config, or check that it belongs to this config.

    Raises:
        ValueError: the folder holds a run of another config; the message names the key and the cure.
        FileExistsError: the folder's name is taken by a file.
    """
    if folder.path.exists() and not folder.path.is_dir():
        raise FileExistsError(f"{folder.path} is a file; give another --out")
    for part in folder.path.rglob(".*.part"):
        process = part.name.split(".")[-2]
        if not process.isdecimal() or not psutil.pid_exists(int(process)):  # a kill in the middle of a write left it
            part.unlink(missing_ok=True)
    if folder.config.exists():
        old, new = deciding(load_run_config(folder.path)), deciding(config)
        differing = differing_key(old, new)
        if differing is not None:
            raise ValueError(
                f"{folder.path} holds a run of another config: {differing} is {_value(old, differing)!r} there "
                f"and {_value(new, differing)!r} now; "
                "give another --out, or remove that folder"
            )
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    with replacing(folder.config) as part:
        save_config(config, part)


def discard(folder: RunFolder) -> None:
    """Remove what a run left in its folder, and nothing else."""
    for path in (
        folder.weights,  # first: without them the run does not count as finished
        folder.config,
        folder.distiller,
        folder.losses,
        folder.gradients,
        folder.cost,
        folder.metrics,
        folder.validation,
        folder.versions,
    ):
        path.unlink(missing_ok=True)
    for name in ("checkpoint", "tensorboard", "stages"):
        shutil.rmtree(folder.path / name, ignore_errors=True)


def save_weights(path: Path, module: nn.Module) -> None:
    """Write a module's parameters and buffers as safetensors, whole or not at all."""
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    with replacing(path) as part:
        save_file(state, part)


def load_weights(path: Path, module: nn.Module) -> None:
    """Read safetensors into a module; half precision is cast to the module's type.

    Raises:
        ValueError: the file's names or shapes are not the module's.
    """
    saved = load_file(path)
    wanted = module.state_dict()
    missing, unknown = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if missing or unknown:
        raise ValueError(f"{path}: does not fit its config.json: lacks {missing[:3]}, has unknown {unknown[:3]}")
    wrong = [name for name in wanted if wanted[name].shape != saved[name].shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{path}: {name} is {tuple(saved[name].shape)}, its config.json wants {tuple(wanted[name].shape)}"
        )
    module.load_state_dict({name: value.to(wanted[name].dtype) for name, value in saved.items()})


def load_run_config(run: Path | str) -> RunConfig:
    """The config of a run folder.

    Raises:
        FileNotFoundError: no such folder, or no config in it.
        ValueError: the config cannot be read.
    """
    return _part(RunConfig, run)


def load_detector_config(run: Path | str) -> DetectorConfig:
    """The config of a run folder's detector, or of an exported one's; errors as `load_run_config`."""
    return _part(DetectorConfig, run, "detector")


def _part(kind: type[C], run: Path | str, key: str | None = None) -> C:
    """A run folder's config.json, or the part of it under a key."""
    folder = RunFolder(Path(run))
    if not folder.path.is_dir():
        raise FileNotFoundError(f"{folder.path}: no such run folder; `kdlab train` makes one")
    if not folder.config.exists():
        raise FileNotFoundError(f"{folder.path}: not a run folder, it has no config.json")
    try:
        plain = json.loads(folder.config.read_text())
        classes = plain.pop(EXPORT, {}).get("classes", list(CLASSES))
        if classes != list(CLASSES):
            raise ValueError(f"the detector knows other classes than this kdlab: {', '.join(classes)}")
        return from_dict(kind, plain[key] if key else plain)
    except KeyError as error:
        raise ValueError(f"{folder.config}: not of kdlab, it has no {error}") from error
    except ValueError as error:
        raise ValueError(f"{folder.config}: {error}") from error


def load_detector(run: Path | str, device: torch.device | str = "cpu") -> Detector:
    """The trained detector of a run folder, an exported one, or any with config.json and weights, in eval mode.

    Needs neither the teacher nor the training code. Weights stored in half precision are cast to float32.

    Raises:
        FileNotFoundError: no such folder, or its training has not ended.
        ValueError: config and weights do not fit each other.
    """
    from kdlab.models.detector import build_detector

    config, folder = load_detector_config(run), RunFolder(Path(run))
    if not folder.finished:
        raise FileNotFoundError(
            f"{folder.path}: the run is not finished (no {folder.weights.name}); run its `kdlab train` again to go on"
        )
    with torch.random.fork_rng(devices=[]):
        detector = build_detector(config, load_pretrained=False)
    load_weights(folder.weights, detector)
    return detector.to(device).eval()


def taken_over(camera: CameraEncoder, source: CameraEncoder) -> dict[str, Tensor]:
    """What a camera branch starts with of another: all, but how frames are mixed where their numbers differ."""
    mixes = camera.config.frames == source.config.frames
    return {name: value for name, value in source.state_dict().items() if mixes or not name.startswith("temporal.")}


def start_camera(detector: Detector, run: Path | str) -> None:
    """Copy a trained camera branch that fits (`kdlab.pairing`); what is not `taken_over`, or is not there, stays.

    Raises:
        FileNotFoundError: no such run, or its training has not ended.
    """
    source = load_detector(run).camera
    assert source is not None and detector.camera is not None
    detector.camera.load_state_dict({**detector.camera.state_dict(), **taken_over(detector.camera, source)})


def save_state(folder: RunFolder, state: Mapping[str, Any]) -> None:
    """Write the checkpoint, whole or not at all."""
    with replacing(folder.checkpoint) as part:
        torch.save(dict(state), part)


def load_state(folder: RunFolder) -> dict[str, Any] | None:
    """The checkpoint, on the CPU; None where there is none.

    Raises:
        ValueError: the file cannot be read.
    """
    if not folder.checkpoint.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(folder.checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(
            f"{folder.checkpoint} cannot be read ({error}); remove {folder.path} and train again"
        ) from error
    return state
