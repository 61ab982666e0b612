"""Data sets in the nuScenes format against nuscenes-devkit, and their errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mini_set import CAMERA_DELAY, HEIGHT, KEYFRAMES, LIDAR_ORIGIN, VERSION, WIDTH, ego_pose, wall, write_mini_set
from nuscenes import NuScenes
from nuscenes.eval.common.utils import quaternion_yaw
from nuscenes.utils.data_classes import LidarPointCloud
from pyquaternion import Quaternion

from kdlab.data.nuscenes import NuScenesDataset, pose_matrices
from kdlab.geometry import pose, transform
from kdlab.sample import ATTRIBUTES, CAMERAS, CLASSES, Sample


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_set(tmp_path_factory.mktemp("mini") / "set")


@pytest.fixture(scope="module")
def devkit(root: Path) -> NuScenes:
    return NuScenes(VERSION, str(root), verbose=False)


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(root, tmp_path / "set", ignore=shutil.ignore_patterns(".kdlab*")))


def global_from(nusc: NuScenes, sample_data_token: str) -> np.ndarray:
    record = nusc.get("ego_pose", nusc.get("sample_data", sample_data_token)["ego_pose_token"])
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = Quaternion(record["rotation"]).rotation_matrix, record["translation"]
    return matrix


def test_length_tokens_scenes_splits(root: Path) -> None:
    everything = NuScenesDataset(root)
    assert len(everything) == 6 and everything.version == VERSION
    assert list(everything.scenes) == list(KEYFRAMES)
    train = NuScenesDataset(root, split="tiny_train")
    assert train.tokens == [f"tiny-0001-{i}" for i in range(3)] == train.scenes["tiny-0001"]
    assert train.digest == everything.digest and train.image_size == (HEIGHT, WIDTH)
    assert train[-1].token == train.sample("tiny-0001-2").token == "tiny-0001-2"
    assert [s.token for s in train] == train.tokens
    assert "tiny_train: 3 samples, 1 scenes" in repr(train)


def test_shapes_and_types(root: Path) -> None:
    sample = NuScenesDataset(root, frames=2, sweeps=2)[1]
    assert sample.images.shape == (2, 6, 3, HEIGHT, WIDTH) and sample.images.dtype == torch.uint8
    assert sample.image_from_camera.shape == (2, 6, 3, 3) and sample.frame_from_camera.shape == (2, 6, 4, 4)
    for value in (sample.image_from_camera, sample.frame_from_camera, sample.key_from_frame, sample.frame_times,
                  sample.points, sample.boxes.values, sample.lidar_origin):  # fmt: skip
        assert value.dtype == torch.float32
    assert sample.global_from_key.dtype == torch.float64
    assert torch.equal(sample.bev_augmentation, torch.eye(4)) and torch.equal(sample.key_from_frame[0], torch.eye(4))
    assert sample.lidar_origin.tolist() == pytest.approx(LIDAR_ORIGIN)
    assert sample.scene == "tiny-0001" and sample.timestamp == pytest.approx(1_600_000_000.5, abs=1e-6)


def test_without_images_or_points(root: Path) -> None:
    sample = NuScenesDataset(root, images=False, frames=2)[1]
    assert sample.images.shape[:2] == (2, 0) and sample.frame_from_camera.shape == (2, 0, 4, 4)
    assert len(sample.points) > 0
    assert NuScenesDataset(root, points=False)[0].points.shape == (0, 5)


def test_pose_matrices_match_geometry() -> None:
    values = np.random.default_rng(0).normal(size=(5, 7))
    for matrix, row in zip(pose_matrices(values), values, strict=True):
        np.testing.assert_allclose(matrix, pose(row[:4], row[4:]).numpy(), atol=1e-12)


def devkit_boxes(nusc: NuScenes, token: str, keep_empty: bool) -> list[list[float]]:
    """Boxes in the key ego frame by the devkit: label, 9 values, points, visibility, attribute."""
    from nuscenes.eval.detection.utils import category_to_detection_name

    record = nusc.get("sample", token)
    lidar = nusc.get("sample_data", record["data"]["LIDAR_TOP"])
    ego = nusc.get("ego_pose", lidar["ego_pose_token"])
    back = Quaternion(ego["rotation"]).inverse
    rows = []
    for annotation in (nusc.get("sample_annotation", t) for t in record["anns"]):
        name = category_to_detection_name(annotation["category_name"])
        if name is None or not (keep_empty or annotation["num_lidar_pts"] + annotation["num_radar_pts"]):
            continue
        box = nusc.get_box(annotation["token"])
        box.velocity = nusc.box_velocity(annotation["token"])
        box.translate(-np.array(ego["translation"]))
        box.rotate(back)
        width, length, height = box.wlh
        attributes = [nusc.get("attribute", t)["name"] for t in annotation["attribute_tokens"]]
        rest = (annotation["num_lidar_pts"], annotation["visibility_token"])
        values = (*box.center, length, width, height, quaternion_yaw(box.orientation), *box.velocity[:2])
        attribute = ATTRIBUTES.index(attributes[0]) if attributes else -1
        rows.append([CLASSES.index(name), *values, *map(int, rest), attribute])
    return rows


def assert_boxes_match(sample: Sample, expected: list[list[float]]) -> None:
    boxes = sample.boxes
    table = np.array(expected).reshape(-1, 13)
    np.testing.assert_array_equal(boxes.labels, table[:, 0])
    difference = boxes.values.numpy() - table[:, 1:10]
    difference[:, 6] = (difference[:, 6] + np.pi) % (2 * np.pi) - np.pi
    np.testing.assert_array_equal(np.isnan(boxes.values), np.isnan(table[:, 1:10]))
    assert (np.abs(np.nan_to_num(difference)) < 1e-4).all()
    np.testing.assert_array_equal(torch.stack((boxes.points, boxes.visibility, boxes.attributes), 1), table[:, 10:])
    assert boxes.valid.all()


@pytest.mark.parametrize("keep_empty", [False, True])
def test_boxes_match_devkit(root: Path, devkit: NuScenes, keep_empty: bool) -> None:
    dataset = NuScenesDataset(root, images=False, points=False, keep_empty=keep_empty)
    for sample in dataset:
        assert_boxes_match(sample, devkit_boxes(devkit, sample.token, keep_empty))


def test_velocity_rules(root: Path) -> None:
    dataset = NuScenesDataset(root, images=False, points=False)
    known = [[bool(k) for k in s.boxes.velocity_known] for s in dataset]
    # Cars then pedestrians; the pedestrian is annotated once; 2 s to the next keyframe is too long; the last is empty.
    assert known == [[True, False], [True], [True], [False, False], [False], []]
    assert [len(s.boxes) for s in dataset][-1] == 0
    presence = dataset.class_presence()
    assert presence[:, CLASSES.index("car")].tolist() == [True] * 5 + [False]
    assert presence[:, CLASSES.index("pedestrian")].tolist() == [True, False, False, True, False, False]
    assert not presence[:, CLASSES.index("barrier")].any()  # Barriers have no points here.
    assert NuScenesDataset(root, keep_empty=True).class_presence()[:, CLASSES.index("barrier")].sum() == 5


def test_boxes_match_devkit_on_real_keyframe(keyframe_root: Path) -> None:
    nusc = NuScenes("v1.0-keyframe", str(keyframe_root), verbose=False)
    dataset = NuScenesDataset(keyframe_root, split="keyframe")
    assert_boxes_match(dataset.load(0, 8), devkit_boxes(nusc, dataset.tokens[0], False))


def test_cloud_matches_devkit_multisweep(root: Path, devkit: NuScenes) -> None:
    dataset = NuScenesDataset(root, images=False, sweeps=4)
    for sample in dataset:
        record = devkit.get("sample", sample.token)
        cloud, times = LidarPointCloud.from_file_multisweep(devkit, record, "LIDAR_TOP", "LIDAR_TOP", nsweeps=4)
        finite = np.isfinite(cloud.points).all(0)
        lidar = devkit.get("calibrated_sensor", "calibration-LIDAR_TOP")
        cloud.points = cloud.points[:, finite]
        cloud.rotate(Quaternion(lidar["rotation"]).rotation_matrix)
        cloud.translate(np.array(lidar["translation"]))
        np.testing.assert_allclose(sample.points[:, :3], cloud.points[:3].T, atol=1e-3)
        np.testing.assert_allclose(sample.points[:, 3], cloud.points[3] / 255, atol=1e-6)
        np.testing.assert_allclose(sample.points[:, 4], times[0, finite], atol=1e-6)


def test_static_wall_aligns_over_sweeps(root: Path) -> None:
    dataset = NuScenesDataset(root, images=False, sweeps=4)
    sample = dataset.sample("tiny-0001-2")
    lags = sample.points[:, 4].unique()
    torch.testing.assert_close(lags, torch.tensor((0.0, 0.05, 0.1, 0.5)))
    turn, place = ego_pose(0, 1_600_000_001_000_000)
    expected = torch.from_numpy((wall(0) - place) @ turn.rotation_matrix).float()
    for lag in lags:  # Unaligned, 0.5 s would be 3 m off.
        torch.testing.assert_close(sample.points[sample.points[:, 4] == lag, :3], expected, atol=1e-3, rtol=0)
    assert len(dataset[0].points) == len(expected)  # A scene's start has one sweep only; ego and NaN points are gone.


def test_past_frames_and_scene_start(root: Path) -> None:
    dataset = NuScenesDataset(root, frames=3)
    torch.testing.assert_close(dataset[2].frame_times, torch.tensor((0.0, 0.5, 1.0)))
    torch.testing.assert_close(dataset[1].frame_times, torch.tensor((0.0, 0.5, 0.5)))
    torch.testing.assert_close(dataset[3].frame_times, torch.zeros(3))
    assert torch.equal(dataset[1].images[1], dataset[1].images[2])
    assert torch.equal(dataset[1].images[1], dataset[0].images[0])
    assert torch.equal(dataset[3].images[1], dataset[3].images[0])  # It never reaches into another scene.


def test_key_from_frame_aligns_static_points(root: Path) -> None:
    sample, past = NuScenesDataset(root, frames=3)[2], NuScenesDataset(root)[0]
    moved = transform(sample.key_from_frame[2], past.points[:, :3])
    torch.testing.assert_close(moved, sample.points[:, :3], atol=1e-3, rtol=0)


def test_projection_matches_devkit(root: Path, devkit: NuScenes) -> None:
    assert CAMERA_DELAY > 0  # Otherwise the cameras' own ego poses would not be tested.
    sample = NuScenesDataset(root, frames=2, keep_empty=True)[2]
    for t, token in enumerate(("tiny-0001-2", "tiny-0001-1")):
        key = global_from(devkit, devkit.get("sample", token)["data"]["LIDAR_TOP"])
        assert_centres_project(devkit, token, sample, t, key)


def test_projection_matches_devkit_on_real_keyframe(keyframe_root: Path) -> None:
    nusc = NuScenes("v1.0-keyframe", str(keyframe_root), verbose=False)
    dataset = NuScenesDataset(keyframe_root, keep_empty=True)
    sample = dataset.load(0, 8)
    sample.image_from_camera[:, :, :2] *= 8
    key = global_from(nusc, nusc.get("sample", sample.token)["data"]["LIDAR_TOP"])
    assert_centres_project(nusc, sample.token, sample, 0, key)


def assert_centres_project(nusc: NuScenes, token: str, sample: Sample, t: int, global_from_frame: np.ndarray) -> None:
    """Box centres of a keyframe, brought to a camera by the sample and by the devkit, agree in metres and pixels."""
    from nuscenes.utils.geometry_utils import BoxVisibility, view_points

    record, seen = nusc.get("sample", token), 0
    for n, camera in enumerate(CAMERAS):
        _, boxes, intrinsic = nusc.get_sample_data(record["data"][camera], box_vis_level=BoxVisibility.NONE)
        expected = np.array([box.center for box in boxes])
        centres = np.array([nusc.get("sample_annotation", box.token)["translation"] for box in boxes])
        to_frame = torch.from_numpy(np.linalg.inv(global_from_frame))
        to_camera = torch.linalg.inv(sample.frame_from_camera[t, n].double())
        found = transform(to_camera @ to_frame, torch.from_numpy(centres))
        np.testing.assert_allclose(found, expected, atol=1e-3)
        front = expected[:, 2] > 1
        pixels = view_points(expected[front].T, intrinsic, normalize=True)[:2].T
        mine = found[front] @ sample.image_from_camera[t, n].double().T
        np.testing.assert_allclose(mine[:, :2] / mine[:, 2:], pixels, atol=0.3)
        seen += int(front.sum())
    assert seen > 0


def test_reduced_decoding_scales_intrinsics(root: Path) -> None:
    dataset = NuScenesDataset(root)
    full, half = dataset.load(0), dataset.load(0, 2)
    assert half.images.shape[-2:] == (HEIGHT // 2, WIDTH // 2)
    torch.testing.assert_close(half.image_from_camera[..., :2, :] * 2, full.image_from_camera[..., :2, :])
    pooled = torch.nn.functional.avg_pool2d(full.images[0].float(), 2)
    assert (pooled - half.images[0]).abs().mean() < 2


def test_camera_order_and_colour(root: Path) -> None:
    images = NuScenesDataset(root)[0].images[0]
    top = images[:, :, : HEIGHT // 3].float().mean((1, 2, 3))
    torch.testing.assert_close(top, torch.arange(6) * 20.0, atol=2, rtol=0)


def test_wrong_root(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*kdlab simulate.*data/README"):
        NuScenesDataset(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"scene\.json and sample\.json.*kdlab simulate"):
        NuScenesDataset(tmp_path)


def test_wrong_version_and_split(root: Path, copy: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no version 'v1\.0-mini'; there is {VERSION}"):
        NuScenesDataset(root, "v1.0-mini")
    with pytest.raises(ValueError, match="no split 'val'; known splits: all, tiny_train, tiny_val"):
        NuScenesDataset(root, split="val")
    shutil.copytree(copy / VERSION, copy / "v1.0-other")
    with pytest.raises(ValueError, match=f"several versions, name one of them: v1.0-other, {VERSION}"):
        NuScenesDataset(copy)


def test_official_splits_come_from_the_devkit(copy: Path) -> None:
    folder = copy / VERSION
    rows = json.loads((folder / "scene.json").read_text())
    rows[0]["name"], rows[1]["name"] = "scene-0103", "scene-0916"
    (folder / "scene.json").write_text(json.dumps(rows))
    (folder / "splits.json").unlink()
    folder.rename(copy / "v1.0-mini")
    assert len(NuScenesDataset(copy, split="mini_val")) == 6
    with pytest.raises(ValueError, match=r"no split 'mini_train'; known splits: mini_val$"):
        NuScenesDataset(copy, split="mini_train")  # Its scenes are not all there.


def test_wrong_arguments(root: Path) -> None:
    with pytest.raises(ValueError, match="frames and sweeps must be at least 1"):
        NuScenesDataset(root, sweeps=0)
    dataset = NuScenesDataset(root)
    with pytest.raises(IndexError, match="sample 6 of 6"):
        dataset[6]
    with pytest.raises(KeyError, match="no sample 'x' in split all"):
        dataset.sample("x")


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.rglob(pattern))[0]


def test_missing_and_damaged_files(copy: Path) -> None:
    dataset = NuScenesDataset(copy)
    image, cloud = first(copy / "samples/CAM_BACK", "*.jpg"), first(copy / "samples/LIDAR_TOP", "*.bin")
    data = image.read_bytes()
    image.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{image.name} .*cut off.*kdlab simulate"):
        dataset[0]
    image.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=rf"{image.name} .*not an image that can be decoded"):
        dataset[0]
    image.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{image.name} \(0 bytes\)"):
        dataset[0]
    image.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{image.name} is missing.*data/README"):
        dataset[0]
    image.write_bytes(data)
    cloud.write_bytes(cloud.read_bytes()[:-7])
    with pytest.raises(ValueError, match=rf"{cloud.name} is cut off: \d+ bytes.*multiple of the 20"):
        dataset[0]
    cloud.write_bytes(b"")
    assert dataset[0].points.shape == (0, 5)


def test_images_of_two_sizes(copy: Path) -> None:
    import cv2

    image = first(copy / "samples/CAM_BACK", "*.jpg")
    cv2.imwrite(str(image), np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(ValueError, match=f"differ in size: 20 x 30 and {HEIGHT} x {WIDTH}"):
        NuScenesDataset(copy)[0]


def test_sample_without_a_camera(copy: Path) -> None:
    path = copy / VERSION / "sample_data.json"
    rows = [r for r in json.loads(path.read_text()) if "CAM_BACK/" not in r["filename"]]
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"sample_data\.json: sample 'tiny-0001-0' has no keyframe of CAM_BACK;"):
        NuScenesDataset(copy)[0]
    assert len(NuScenesDataset(copy, images=False)[0].points) > 0
