"""Data sets in the nuScenes format, real or simulated, as `Sample`s."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlab.data.files import CURE, read_image, read_points
from kdlab.data.image_cache import ImageCache
from kdlab.data.tables import Tables, load_tables
from kdlab.data.tables_json import CHANNELS, Array
from kdlab.sample import CAMERAS, CLASSES, Boxes3D, Sample

_HOW = "Make a simulated data set with `kdlab simulate`, or see data/README.md for how to get nuScenes."


class NuScenesDataset:
    """Keyframes of a data set in the nuScenes format.

    Args:
        root: folder that holds the version folder and samples/ (and sweeps/).
        version: version folder, such as v1.0-mini; may be left out where the root holds a single one.
        split: name of a split, such as mini_train or sim_val; all keyframes where left out.
        frames: key frame and frames - 1 past keyframes; at the start of a scene the earliest is repeated.
        sweeps: LiDAR sweeps in the cloud: the key sweep and sweeps - 1 past ones, fewer at the start of a scene.
        images: read the cameras; without, N = 0.
        points: read the LiDAR; without, P = 0.
        keep_empty: keep annotations without a LiDAR or radar point; nuScenes trains and evaluates without them.
        image_cache: folder where decoded images are kept, see `ImageCache`; "" for none.

    Attributes:
        tokens: sample tokens, scene after scene in the order of time.
        scenes: tokens of every scene name.
        tables: the columns behind it.

    Raises:
        FileNotFoundError: no data set at the root, no such version, a table is missing.
        ValueError: unknown split, several versions to choose from, frames or sweeps below 1, damaged tables.
    """

    def __init__(
        self,
        root: str | Path,
        version: str | None = None,
        split: str | None = None,
        *,
        frames: int = 1,
        sweeps: int = 1,
        images: bool = True,
        points: bool = True,
        keep_empty: bool = False,
        image_cache: str | Path = "",
    ) -> None:
        if frames < 1 or sweeps < 1:
            raise ValueError(f"NuScenesDataset: frames and sweeps must be at least 1, got {frames} and {sweeps}")
        self.root = Path(root).expanduser()
        self.version = find_version(self.root, version)
        self.split = split
        self.frames, self.sweeps, self.images, self.points, self.keep_empty = frames, sweeps, images, points, keep_empty
        self.tables: Tables = load_tables(self.root / self.version)
        self._cache = ImageCache(image_cache) if image_cache and images else None
        self._read_image = read_image if self._cache is None else self._cache.read
        self._rows = self._rows_of(split)
        self.tokens: list[str] = [t.decode() for t in self.tables.sample_token[self._rows]]
        self._index = {token: i for i, token in enumerate(self.tokens)}
        names = [n.decode() for n in self.tables.scene_name[self.tables.sample_scene[self._rows]]]
        self.scenes: dict[str, list[str]] = {}
        for name, token in zip(names, self.tokens, strict=True):
            self.scenes.setdefault(name, []).append(token)
        self._ego_from_sensor = pose_matrices(self.tables.calibration)

    def _rows_of(self, split: str | None) -> Array:
        """Rows of the split's keyframes in the tables."""
        if split is None:
            return np.arange(len(self.tables.sample_token))
        splits = self.tables.split_scenes
        if split not in splits:
            known = ", ".join(sorted(splits)) or "none: the version folder has no splits.json"
            raise ValueError(f"{self.root / self.version} has no split {split!r}; known splits: {known}")
        held = np.isin(self.tables.scene_name, [name.encode() for name in splits[split]])
        return np.flatnonzero(held[self.tables.sample_scene])

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Sample:
        return self.load(index)

    def __iter__(self) -> Iterator[Sample]:
        return (self.load(i) for i in range(len(self)))

    def __repr__(self) -> str:
        held = f"split {self.split or 'all'}: {len(self)} samples, {len(self.scenes)} scenes"
        return f"NuScenesDataset({str(self.root)!r}, {self.version}, {held})"

    @property
    def digest(self) -> str:
        """Identity of the data (tables and generator settings), hexadecimal; the same wherever the folder lies."""
        return str(self.tables.digest.item().decode())

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels, as the tables give them; (0, 0) where they do not."""
        rows = self.tables.sample_data[self._rows, 1:].ravel()
        rows = rows[rows >= 0][:1]
        height, width = self.tables.data_size[rows[0]] if len(rows) else (0, 0)
        return int(height), int(width)

    def sample(self, token: str) -> Sample:
        """The sample of a token.

        Raises:
            KeyError: no such sample in this split.
        """
        if token not in self._index:
            raise KeyError(f"no sample {token!r} in split {self.split or 'all'} of {self.root / self.version}")
        return self.load(self._index[token])

    def class_presence(self) -> Array:
        """Which samples hold a box of which class, bool [samples, 10]; what class-balanced sampling needs."""
        tables = self.tables
        keyframe = np.repeat(np.arange(len(tables.sample_token)), np.diff(tables.box_start))
        keep = np.ones(len(keyframe), bool) if self.keep_empty else tables.box_points.sum(1) > 0
        present = np.zeros((len(tables.sample_token), len(CLASSES)), bool)
        present[keyframe[keep], tables.box_label[keep]] = True
        return present[self._rows]

    def prepare(self, reduce: int) -> str:
        """Make sure, before samples are loaded, that the image cache has room for the split's images.

        Args:
            reduce: as in `load`.

        Returns:
            How much the cache is still to take up, in one line; empty where nothing or where there is no cache.

        Raises:
            ValueError: there is not enough disk space.
        """
        if self._cache is None:
            return ""
        rows = self.tables.sample_data[self._rows, 1:].ravel()
        height, width = self.image_size
        size = (-(-height // reduce), -(-width // reduce))
        return self._cache.reserve((self._path(int(row)) for row in rows[rows >= 0]), reduce, size)

    def load(self, index: int, reduce: int = 1) -> Sample:
        """Read one sample.

        Args:
            index: 0 to len - 1; negative counts from the end.
            reduce: 1, 2, 4 or 8: decode images at 1/reduce of their size, which is faster; ``image_from_camera`` fits.

        Raises:
            IndexError: index out of range.
            FileNotFoundError: a sensor file is missing.
            ValueError: a sensor file is damaged or a keyframe lacks one.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self!r}")
        tables, key = self.tables, int(self._rows[index])
        first = int(np.searchsorted(tables.sample_scene, tables.sample_scene[key]))
        keyframes = np.maximum(key - np.arange(self.frames), first)
        lidar = self._files(keyframes, slice(0, 1))[:, 0]
        global_from_frame = pose_matrices(tables.pose[tables.data_pose[lidar]])
        frame_from_global = np.linalg.inv(global_from_frame)
        key_from_frame = frame_from_global[0] @ global_from_frame
        key_from_frame[0] = np.eye(4)
        images, image_from_camera, frame_from_camera = self._cameras(keyframes, frame_from_global, reduce)
        return Sample(
            token=tables.sample_token[key].decode(),
            scene=tables.scene_name[tables.sample_scene[key]].decode(),
            timestamp=float(tables.data_time[lidar[0]]) * 1e-6,
            images=images,
            image_from_camera=image_from_camera,
            frame_from_camera=frame_from_camera,
            key_from_frame=_float32(key_from_frame),
            frame_times=_float32((tables.data_time[lidar[0]] - tables.data_time[lidar]) * 1e-6),
            points=self._points(int(lidar[0]), frame_from_global[0]) if self.points else torch.zeros(0, 5),
            boxes=self._boxes(key, frame_from_global[0]),
            global_from_key=torch.from_numpy(global_from_frame[0].copy()),
            bev_augmentation=torch.eye(4),
            lidar_origin=_float32(self._ego_from_sensor[tables.data_calibration[lidar[0]]][:3, 3]),
        )

    def _files(self, keyframes: Array, channels: slice) -> Array:
        """Rows of the keyframes' sensor files [T, channels]."""
        rows: Array = self.tables.sample_data[keyframes, channels]
        if (rows < 0).any():
            frame, channel = np.argwhere(rows < 0)[0]
            token = self.tables.sample_token[keyframes[frame]].decode()
            path = self.root / self.version / "sample_data.json"
            raise ValueError(f"{path}: sample {token!r} has no keyframe of {CHANNELS[channels][channel]}; {CURE}")
        return rows

    def _path(self, row: int) -> Path:
        return self.root / str(self.tables.data_file[row].decode())

    def _cameras(self, keyframes: Array, frame_from_global: Array, reduce: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images [T, N, 3, H, W], image_from_camera [T, N, 3, 3] and frame_from_camera [T, N, 4, 4]."""
        tables, frames = self.tables, len(keyframes)
        if not self.images:
            empty = torch.zeros(frames, 0, 3, 0, 0, dtype=torch.uint8)
            return empty, torch.zeros(frames, 0, 3, 3), torch.zeros(frames, 0, 4, 4)
        rows = self._files(keyframes, slice(1, None))
        pixels = self._pixels(rows.ravel().tolist(), reduce)
        pixels = pixels.reshape(frames, len(CAMERAS), *pixels.shape[1:])
        calibration = tables.data_calibration[rows]
        image_from_camera = tables.intrinsic[calibration].reshape(frames, len(CAMERAS), 3, 3).copy()
        image_from_camera[:, :, :2] /= reduce
        global_from_ego = pose_matrices(tables.pose[tables.data_pose[rows]])
        frame_from_camera = frame_from_global[:, None] @ global_from_ego @ self._ego_from_sensor[calibration]
        # A view: colours stay last in memory all the way to the network, which saves four copies.
        return torch.from_numpy(pixels).permute(0, 1, 4, 2, 3), _float32(image_from_camera), _float32(frame_from_camera)

    def _pixels(self, rows: list[int], reduce: int) -> Array:
        """Images of some sensor files, uint8 [rows, H, W, 3]; a file that occurs twice is decoded once."""
        first = self._read_image(self._path(rows[0]), reduce)
        pixels = np.empty((len(rows), *first.shape), np.uint8)
        pixels[0] = first
        for k, row in enumerate(rows[1:], 1):
            before = rows.index(row)
            if before < k:
                pixels[k] = pixels[before]
                continue
            image = self._read_image(self._path(row), reduce, pixels[k])
            if image.shape != first.shape:
                shapes = " and ".join(f"{h} x {w}" for h, w, _ in sorted((first.shape, image.shape)))
                raise ValueError(f"{self._path(row)} and the other images of its sample differ in size: {shapes}")
        return pixels

    def _points(self, row: int, key_from_global: Array) -> Tensor:
        """The cloud of the key sweep (a row of the sensor files) and its past ones, float32 [P, 5]."""
        tables, time = self.tables, self.tables.data_time[row]
        clouds = []
        for _ in range(self.sweeps):
            cloud = read_points(self._path(row))
            ego_from_sensor = self._ego_from_sensor[tables.data_calibration[row]]
            key_from_sensor = key_from_global @ pose_matrices(tables.pose[tables.data_pose[row]]) @ ego_from_sensor
            moved = key_from_sensor.astype(np.float32)
            # As three long rows: adding to rows of three is slow.
            cloud[:, :3] = (moved[:3, :3] @ cloud[:, :3].T + moved[:3, 3:]).T
            cloud[:, 4] = (time - tables.data_time[row]) * 1e-6
            clouds.append(cloud)
            row = int(tables.data_previous[row])
            if row < 0:
                break
        return torch.from_numpy(np.concatenate(clouds))

    def _boxes(self, key: int, key_from_global: Array) -> Boxes3D:
        """Annotations of a keyframe in its ego frame."""
        tables = self.tables
        rows = np.arange(tables.box_start[key], tables.box_start[key + 1])
        if not self.keep_empty:
            rows = rows[tables.box_points[rows].sum(1) > 0]
        geometry = tables.box_geometry[rows]
        key_from_box = key_from_global @ pose_matrices(geometry[:, [6, 7, 8, 9, 0, 1, 2]])
        yaw = np.arctan2(key_from_box[:, 1, 0], key_from_box[:, 0, 0])
        velocity = geometry[:, 10:] @ key_from_global[:3, :3].T
        values = np.concatenate((key_from_box[:, :3, 3], geometry[:, 3:6], yaw[:, None], velocity[:, :2]), 1)
        return Boxes3D(
            values=_float32(values),
            labels=torch.from_numpy(tables.box_label[rows]),
            valid=torch.ones(len(rows), dtype=torch.bool),
            points=torch.from_numpy(tables.box_points[rows, 0]),
            visibility=torch.from_numpy(tables.box_visibility[rows]),
            attributes=torch.from_numpy(tables.box_attribute[rows]),
        )


def pose_matrices(values: Array) -> Array:
    """Poses float64 [..., 4, 4] of quaternions w, x, y, z and translations [..., 7]; `geometry.pose` for many."""
    quaternion = values[..., :4] / np.linalg.norm(values[..., :4], axis=-1, keepdims=True)
    w, x, y, z = np.moveaxis(quaternion, -1, 0)
    rotation = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    matrix = np.zeros((*values.shape[:-1], 4, 4))
    matrix[..., :3, :3] = np.moveaxis(np.array(rotation), (0, 1), (-2, -1))
    matrix[..., :3, 3], matrix[..., 3, 3] = values[..., 4:], 1
    return matrix


def _float32(values: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def find_version(root: Path, version: str | None) -> str:
    """Name of the version folder of a nuScenes-format root; inferred where it holds a single one.

    Raises:
        FileNotFoundError: no such folder; the message says how to make or get a data set.
        ValueError: the root holds several and none was named.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no data set at {root}: there is no such folder. {_HOW}")
    found = sorted(f.name for f in root.iterdir() if (f / "scene.json").is_file() and (f / "sample.json").is_file())
    if not found:
        what = "none of its folders holds scene.json and sample.json (as v1.0-mini does)"
        raise FileNotFoundError(f"no data set at {root}: {what}. {_HOW}")
    if version is None:
        if len(found) > 1:
            raise ValueError(f"{root} holds several versions, name one of them: {', '.join(found)}")
        return found[0]
    if version not in found:
        raise FileNotFoundError(f"{root} holds no version {version!r}; there is {', '.join(found)}")
    return version
