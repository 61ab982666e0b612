"""The annotations of a split, as the nuScenes evaluation sees them, from kdlab's table cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from kdlab.data.nuscenes import find_version
from kdlab.data.tables import Tables, load_tables
from kdlab.metrics.boxes import Array, EvalBoxes
from kdlab.sample import CLASSES

PREDEFINED = {"train": "trainval", "val": "trainval", "train_detect": "trainval", "train_track": "trainval",
              "mini_train": "mini", "mini_val": "mini", "test": "test"}  # fmt: skip
"""nuScenes' own splits and how the name of the version that holds them ends."""


@dataclass(frozen=True)
class Racks:
    """Bicycle racks: bicycles and motorcycles in them do not count.

    Attributes:
        start: int64 [S + 1]: racks of sample s are rows start[s]:start[s + 1].
        translation: float64 [R, 3]: centre in the global frame, metres.
        size: float64 [R, 3]: width, length, height, metres.
        rotation: float64 [R, 4]: quaternion w, x, y, z.
    """

    start: Array
    translation: Array
    size: Array
    rotation: Array


@dataclass(frozen=True)
class Truth:
    """What predictions are compared with: S samples of a split.

    Attributes:
        tokens: sample tokens in the order of sample.json.
        scene: name of each sample's scene.
        night: bool [S]: the scene's description says so.
        ego: float64 [S, 3]: the ego vehicle in the global frame at the key LiDAR sweep, metres.
        boxes: all annotations of the ten classes, score -1, not yet filtered.
        racks: bicycle racks.
        version: version folder.
        split: name of the split.
        predefined: whether it is one of nuScenes' own splits, for which a result file must hold exactly its samples,
            and the order of samples is that of the file; otherwise further samples of the file are left out.
        digest: identity of the data (`kdlab.data.tables.Tables.digest`).
    """

    tokens: list[str]
    scene: list[str]
    night: Array
    ego: Array
    boxes: EvalBoxes
    racks: Racks
    version: str
    split: str
    predefined: bool
    digest: str

    @cached_property
    def index(self) -> dict[str, int]:
        """Index of each token."""
        return {token: i for i, token in enumerate(self.tokens)}

    @cached_property
    def name(self) -> str:
        """Split, version and a digest of the tokens: boxes that were read for other samples point to wrong ones."""
        tokens = hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()
        return f"split {self.split!r} of {self.version}, samples {tokens[:12]}"

    def check(self, boxes: EvalBoxes) -> None:
        """Make sure that predictions were read for these samples.

        Raises:
            ValueError: they were read for others.
        """
        if boxes.of not in ("", self.name):
            raise ValueError(f"the predictions were read for {boxes.of}, not for {self.name}: read them for this split")

    def arrange(self, tokens: Sequence[str], what: str) -> list[str]:
        """The split's samples in the order in which the devkit holds the predictions of results for ``tokens``.

        Args:
            tokens: samples of the results, in their order.
            what: the results, for the message.

        Raises:
            ValueError: a sample is missing or, for a predefined split, is not of it.
        """
        given = set(tokens)
        missing = [token for token in self.tokens if token not in given]
        if missing:
            raise ValueError(
                f"{what}: {len(missing)} of the {len(self.tokens)} samples of split {self.split!r} of {self.version} "
                f"are missing, such as {missing[0]!r}; a sample without predictions has an empty list"
            )
        if not self.predefined:
            return list(self.tokens)
        unknown = next((token for token in tokens if token not in self.index), None)
        if unknown is not None:
            raise ValueError(f"{what}: sample {unknown!r} is not of split {self.split!r} of {self.version}")
        return list(tokens)


def load_truth(root: Path | str, split: str, version: str | None = None) -> Truth:
    """Read the annotations of a split.

    Args:
        root: nuScenes-format root.
        split: one of nuScenes' own splits, or one of splits.json in the version folder.
        version: version folder; inferred where there is a single one.

    Raises:
        FileNotFoundError: no data set at the root, no such version, a table is missing.
        ValueError: no such split, or annotations that nuScenes does not evaluate: none at all, an attribute that
            nuScenes does not know or more than one for a box, a number that is NaN.
    """
    root = Path(root).expanduser()
    version = find_version(root, version)
    tables = load_tables(root / version)
    predefined = split in PREDEFINED
    rows = _keyframes(tables, _scenes(tables, split, root / version))
    tokens = [t.decode() for t in tables.sample_token[rows]]
    scene = tables.sample_scene[rows]
    lidar = tables.sample_data[rows, 0]
    if (lidar < 0).any():
        raise ValueError(f"{root / version}: sample {tokens[int(np.argmin(lidar))]!r} has no LiDAR keyframe")
    boxes = _boxes(tables, rows)
    where = f"{root / version}, split {split!r}"
    _check(tables, rows, boxes, tokens, where)
    _, rack = _spans(tables.rack_start, rows)
    geometry = tables.rack_geometry[rack]
    counts = np.diff(tables.rack_start)[rows]
    return Truth(
        tokens=tokens,
        scene=[tables.scene_name[s].decode() for s in scene],
        night=np.array([b"night" in text.lower() for text in tables.scene_description[scene]], bool),
        ego=tables.pose[tables.data_pose[lidar], 4:7],
        boxes=boxes,
        racks=Racks(np.concatenate(([0], counts.cumsum())), geometry[:, :3], geometry[:, [4, 3, 5]], geometry[:, 6:10]),
        version=version,
        split=split,
        predefined=predefined,
        digest=tables.digest.item().decode(),
    )


def _scenes(tables: Tables, split: str, folder: Path) -> list[str]:
    """Scene names of a split, found as the devkit finds them."""
    if split in PREDEFINED:
        if split not in tables.official_splits:
            raise ValueError(
                f"{folder}: {split!r} is one of nuScenes' own splits and needs scenes of a version that ends in "
                f"{PREDEFINED[split]!r}; give a split of splits.json another name"
            )
        return tables.official_splits[split]
    known = {name: scenes for name, scenes in tables.split_scenes.items() if name not in PREDEFINED}
    if split not in known:
        names = sorted(known) + list(tables.official_splits)
        raise ValueError(f"{folder} has no split {split!r}; known splits: {', '.join(names) or 'none'}")
    return known[split]


def _keyframes(tables: Tables, scenes: Sequence[str]) -> Array:
    """Rows of the scenes' keyframes in the order of sample.json."""
    held = np.isin(tables.scene_name, [name.encode() for name in scenes])
    rows = np.flatnonzero(held[tables.sample_scene])
    ordered: Array = rows[np.argsort(tables.sample_rank[rows])]
    return ordered


def _spans(start: Array, rows: Array) -> tuple[Array, Array]:
    """Index into rows, and item, of all items that belong to the rows; item i belongs to row r where start says so."""
    counts = np.diff(start)[rows]
    place = np.repeat(np.arange(len(rows)), counts)
    first = np.repeat(start[rows] - np.concatenate(([0], counts.cumsum()[:-1])) if len(rows) else start[rows], counts)
    return place, first + np.arange(len(place))


def _boxes(tables: Tables, rows: Array) -> EvalBoxes:
    sample, box = _spans(tables.box_start, rows)
    geometry = tables.box_geometry[box]
    return EvalBoxes(
        sample=sample,
        owner=sample,
        translation=np.ascontiguousarray(geometry[:, :3]),
        size=geometry[:, [4, 3, 5]],
        rotation=np.ascontiguousarray(geometry[:, 6:10]),
        velocity=np.ascontiguousarray(geometry[:, 10:12]),
        label=tables.box_label[box],
        score=np.full(len(box), -1.0),
        attribute=tables.box_attribute[box],
        points=tables.box_points[box].sum(1),
        visibility=tables.box_visibility[box],
    )


def _check(tables: Tables, rows: Array, boxes: EvalBoxes, tokens: list[str], where: str) -> None:
    """Refuse annotations that the devkit refuses."""
    if not len(boxes):
        raise ValueError(f"{where}: no annotation of the ten classes; there is nothing to evaluate against")
    given = tables.box_attribute_count[_spans(tables.box_start, rows)[1]]
    numbers = np.concatenate((boxes.translation, boxes.size, boxes.rotation), 1)
    wrong = (
        (given > 1, "more than one attribute"),
        ((given == 1) & (boxes.attribute < 0), "an attribute that nuScenes does not know"),
        (np.isnan(numbers).any(1), "a NaN in its centre, size or rotation"),
    )
    for bad, what in wrong:
        if bad.any():
            i = int(np.argmax(bad))
            box = f"a {CLASSES[boxes.label[i]]} of sample {tokens[boxes.sample[i]]!r}"
            raise ValueError(f"{where}: {box} has {what}, which the nuScenes evaluation does not take")
