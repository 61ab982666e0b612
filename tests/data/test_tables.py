"""The column cache of the tables: fresh, stale, damaged, not writable; damaged tables."""

import json
import os
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from mini_set import VERSION, write_mini_set

from kdlab.data import tables as module
from kdlab.data.tables import CACHE_NAME, Tables, load_tables
from kdlab.data.tables_json import CATEGORIES, records


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_mini_set(tmp_path / "set") / VERSION


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders whose JSON files were read."""
    seen: list[Path] = []
    original = module.read_columns

    def counted(folder: Path) -> dict[str, np.ndarray]:
        seen.append(folder)
        return original(folder)

    monkeypatch.setattr(module, "read_columns", counted)
    return seen


def assert_same(a: Tables, b: Tables) -> None:
    for f in fields(Tables):
        left, right = getattr(a, f.name), getattr(b, f.name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def test_second_start_reads_the_cache(folder: Path, readings: list[Path]) -> None:
    one, two = load_tables(folder), load_tables(folder)
    assert readings == [folder] and (folder / CACHE_NAME).is_file()
    assert_same(one, two)
    assert [f.name for f in folder.iterdir() if ".tmp" in f.name] == []


def test_changed_table_or_schema_rebuilds(folder: Path, readings: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_tables(folder)
    path = folder / "category.json"
    edit(path, '"name": "vehicle.car"', '"name": "vehicle.bus.rigid"')
    second = load_tables(folder)
    assert len(readings) == 2 and first.digest != second.digest
    os.utime(path, (1, 1))
    third = load_tables(folder)
    assert len(readings) == 3 and second.digest == third.digest
    monkeypatch.setattr(module, "SCHEMA", module.SCHEMA + 1)
    load_tables(folder)
    assert len(readings) == 4
    load_tables(folder)
    assert len(readings) == 4


def test_digest_covers_generator_settings_but_not_splits(folder: Path) -> None:
    first = load_tables(folder).digest
    (folder / "splits.json").write_text(json.dumps({"more": ["tiny-0001"]}))
    assert load_tables(folder).digest == first
    (folder / "settings.json").write_text(json.dumps({"night": 1.0}))
    assert load_tables(folder).digest != first


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "garbage", "pickle", "lacking"])
def test_damaged_cache_is_rebuilt(folder: Path, readings: list[Path], damage: str) -> None:
    good, path = load_tables(folder), folder / CACHE_NAME
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        with zipfile.ZipFile(path) as archive:
            place = archive.getinfo("box_geometry.npy").header_offset + 400
        data[place] ^= 0xFF
        path.write_bytes(data)
    elif damage in ("empty", "garbage"):
        path.write_bytes(b"" if damage == "empty" else b"garbage" * 100)
    else:
        with np.load(path) as file:
            columns = dict(file)
        if damage == "pickle":
            columns["pose"] = np.array([{"a": 1}], object)
        else:
            del columns["pose"]
        np.savez(path, **columns)
    assert_same(load_tables(folder), good)
    assert len(readings) == 2
    load_tables(folder)
    assert len(readings) == 2


def test_read_only_folder_uses_the_users_cache(folder: Path, readings: list[Path], tmp_path: Path) -> None:
    folder.chmod(0o555)
    try:
        one, two = load_tables(folder), load_tables(folder)
    finally:
        folder.chmod(0o755)
    assert len(readings) == 1 and not (folder / CACHE_NAME).exists()
    assert len(list((tmp_path / "cache" / "kdlab").glob("tables-*.npz"))) == 1
    assert_same(one, two)


def test_no_writable_cache_is_no_error(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where a folder is wanted")
    folder.chmod(0o555)
    try:
        assert len(load_tables(folder).sample_token) == 6
    finally:
        folder.chmod(0o755)
    assert "no table cache could be written" in caplog.text


def test_keyframes_are_sorted_by_scene_and_time(folder: Path) -> None:
    path = folder / "sample.json"
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))
    tables = load_tables(folder)
    assert [t.decode() for t in tables.sample_token] == [f"tiny-000{s}-{i}" for s in (1, 2) for i in range(3)]
    assert tables.box_start.tolist() == [0, 3, 5, 7, 10, 12, 12]
    assert tables.split_scenes["tiny_val"] == ["tiny-0002"]


def test_a_renamed_version_is_read_anew(folder: Path, readings: list[Path]) -> None:
    load_tables(folder)
    load_tables(folder.rename(folder.with_name("v1.0-other")))  # Its name decides which of nuScenes' splits fit.
    assert len(readings) == 2


def test_rank_and_order_are_those_of_the_files(folder: Path) -> None:
    for name in ("sample", "sample_annotation"):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text())[::-1]))
    tables = load_tables(folder)
    assert tables.sample_rank.tolist() == [5, 4, 3, 2, 1, 0]
    assert tables.box_label[:3].tolist() == [5, 8, 0]  # Barrier, pedestrian, car: last written, first read.
    assert tables.box_attribute_count[:3].tolist() == [0, 1, 1]


def test_racks_descriptions_and_nuscenes_own_splits(folder: Path) -> None:
    digest = load_tables(folder).digest
    edit(folder / "scene.json", '"description": ""', '"description": "Night"')
    edit(folder / "category.json", '"name": "animal"', '"name": "static_object.bicycle_rack"')
    tables = load_tables(folder)
    assert tables.rack_start.tolist() == [0, 1, 2, 3, 4, 5, 5] and tables.scene_description.tolist() == [b"Night"] * 2
    assert tables.rack_geometry.shape == (5, 10) and tables.rack_geometry[0, 3:6].tolist() == [0.8, 0.3, 0.5]
    assert tables.official_splits == {} and tables.digest == digest  # Stored weights name older columns alone.
    edit(folder / "scene.json", '"tiny-0001"', '"scene-0061"')
    edit(folder / "splits.json", "tiny-0001", "scene-0061")
    assert load_tables(folder.rename(folder.with_name("v1.0-mini"))).official_splits == {"mini_train": ["scene-0061"]}


def test_chain_that_leaves_the_tables_ends(folder: Path) -> None:
    path = folder / "sample_data.json"
    path.write_text(json.dumps([r for r in json.loads(path.read_text()) if "sweeps/" not in r["filename"]]))
    tables = load_tables(folder)
    assert (tables.data_previous == -1).all()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_messages_for_damaged_tables(folder: Path) -> None:
    (folder / "ego_pose.json").rename(folder / "ego_pose.txt")
    with pytest.raises(FileNotFoundError, match=r"ego_pose\.json is missing.*kdlab simulate"):
        load_tables(folder)
    (folder / "ego_pose.txt").rename(folder / "ego_pose.json")
    good = (folder / "sample.json").read_text()
    for text, message in (
        (good[:-40], r"sample\.json: cut off or not JSON"),
        ("{}", r"sample\.json: not a nuScenes table"),
        ("[1, 2]", r"sample\.json: holds 1 where a record"),
        (good.replace("scene_token", "scene"), r"no field or record 'scene_token', which"),
        (good.replace("scene-tiny-0002", "scene-x"), r"sample\.json: refers to scene 'scene-x', which scene\.json"),
        ("[]", r"refers to sample 'tiny-0001-0', which sample\.json"),
    ):
        (folder / "sample.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_tables(folder)
    (folder / "sample.json").write_text(good)
    edit(folder / "instance.json", '"category-animal"', '"category-x"')
    with pytest.raises(ValueError, match="no field or record 'category-x', which"):
        load_tables(folder)
    edit(folder / "instance.json", '"category-x"', '"category-animal"')
    edit(folder / "ego_pose.json", '"pose-1600000000500000"', '"elsewhere"')
    with pytest.raises(ValueError, match=r"ego_pose\.json: no pose 'pose-1600000000500000'"):
        load_tables(folder)


def test_messages_for_damaged_splits(folder: Path) -> None:
    (folder / "splits.json").write_text('{"train": ["tiny-0009"]}')
    with pytest.raises(ValueError, match=r"splits\.json: split 'train' names scene 'tiny-0009'"):
        load_tables(folder)
    for text in ("{", "[1]", '{"train": 3}'):
        (folder / "splits.json").write_text(text)
        with pytest.raises(ValueError, match=r"splits\.json: must map split names to lists of scene names"):
            load_tables(folder)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_records_do_not_depend_on_chunks(folder: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "sensor.json"
    monkeypatch.setattr("kdlab.data.tables_json._CHUNK", chunk)
    assert list(records(path)) == json.loads(path.read_text())


@pytest.mark.parametrize("chunk", range(1, 40))
def test_spaces_at_the_end_of_a_chunk_stay(folder: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "scene.json"
    table = [{"name": "a  b } , { c ", "description": "  rain,  night  "}, {"name": " ", "description": ""}]
    monkeypatch.setattr("kdlab.data.tables_json._CHUNK", chunk)
    for text in (json.dumps(table), "[" + json.dumps(table, indent=2)[1:] + " \n"):
        path.write_text(text)
        assert list(records(path)) == table


def test_annotations_of_one_time_are_refused(folder: Path) -> None:
    rows = json.loads((folder / "sample.json").read_text())
    times = sorted(r["timestamp"] for r in rows if r["scene_token"] == rows[0]["scene_token"])
    edit(folder / "sample.json", f'"timestamp": {times[1]}', f'"timestamp": {times[0]}')
    with pytest.raises(ValueError, match=r"sample_annotation\.json: '.+' has no velocity: the annotations before"):
        load_tables(folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_an_interrupted_cache_leaves_nothing(
    folder: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("now")

    before = sorted(p.name for p in folder.iterdir())
    monkeypatch.setattr(np, "savez", fail)
    if error is OSError:
        load_tables(folder)
    else:
        with pytest.raises(error):
            load_tables(folder)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_categories_are_the_devkits() -> None:
    from nuscenes.eval.detection.utils import category_to_detection_name
    from nuscenes.utils.color_map import get_colormap

    found = {name: category_to_detection_name(name) for name in get_colormap()}
    assert {name: kind for name, kind in found.items() if kind} == CATEGORIES
