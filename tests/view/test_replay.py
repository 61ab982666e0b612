from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sight_fakes import features_of, sight_of

from kdlab.distill import Cells, TermResult
from kdlab.geometry import BEVGrid
from kdlab.sample import Detections, Sample
from kdlab.view import replay
from kdlab.view.replay import write_replay
from kdlab.view.sight.data import Sight
from kdlab.view.sight.layers import Layer, feature_layers


def sights_of(sample: Sample, grid: BEVGrid, count: int = 3) -> list[Sight]:
    """A training that watches one sample: the teacher stays, the student changes and its loss falls."""
    teacher = features_of(0, grid.shape)
    values = torch.tensor([[5.0, 1, 1, 4, 2, 2, 0.5, 0, 0]])
    found = []
    for step in range(count):
        errors = torch.rand(1, *grid.shape, generator=torch.Generator().manual_seed(step)) / (step + 1)
        found.append(
            sight_of(
                sample,
                grid,
                teacher=teacher,
                student=features_of(step + 1, grid.shape),
                detections={"student": Detections(values, torch.tensor([0]), torch.tensor([0.6]))},
                results={"feature": TermResult.of(errors, Cells(), grid)},
            )
        )
    return found


class Page:
    """What a browser makes of a replay."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text()
        found = re.search(r'<script type="application/json" id="page">(.*?)</script>', self.text, re.S)
        assert found is not None
        self.page = json.loads(found[1])
        chunks = dict(re.findall(r'<script type="application/base64" id="chunk-(\w+)">(.*?)</script>', self.text))
        raw = {name: zlib.decompress(base64.b64decode(chunk)) for name, chunk in chunks.items()}
        lengths = {name: struct.unpack("<I", data[:4])[0] for name, data in raw.items()}
        self.bytes = {name: data[4 + lengths[name] :] for name, data in raw.items()}
        self.json = {name: json.loads(data[4 : 4 + lengths[name]]) for name, data in raw.items()}

    def frame(self, index: int) -> Any:
        return self._revived(self.json[str(index)])

    def _revived(self, value: Any) -> Any:
        if isinstance(value, dict) and "$" in value:
            name, offset, length = value["$"]
            return self.bytes[name][offset : offset + length]
        if isinstance(value, dict):
            return {key: self._revived(one) for key, one in value.items()}
        return [self._revived(one) for one in value] if isinstance(value, list) else value


def test_a_replay_holds_what_the_sights_show(sample: Sample, grid: BEVGrid, tmp_path: Path) -> None:
    sights = sights_of(sample, grid)
    path = write_replay(
        tmp_path / "new" / "replay.html",
        sights,
        ("bev", "stages[1]"),
        ("norm", 2),
        title="a <b>",
        labels=["0", "10", "20"],
    )
    page = Page(path)
    assert page.page["labels"] == ["0", "10", "20"] and page.page["views"] == ["norm", "channel 2"]
    assert page.page["terms"] == ["all", "feature"] and "foreground" in page.page["masks"]
    assert page.page["state"]["cells"] == [32, 32] and "<title>a &lt;b&gt;</title>" in page.text
    scale = [page.frame(i)["maps"]["bev|norm"][0] for i in range(3)]
    assert len({(s["low"], s["high"]) for s in scale}) == 1  # one scale, so that frames can be compared
    for index, sight in enumerate(sights):
        frame = page.frame(index)
        panel = frame["maps"]["bev|channel 2"][1]
        assert panel["kind"] == "uint8" and panel["title"] == "student: bev, channel 2"
        steps = np.frombuffer(panel["values"], np.uint8).reshape(32, 32)
        read = panel["low"] + (steps - 1.0) / 254 * (panel["high"] - panel["low"])
        assert sight.student is not None
        expected = sight.student.bev[0, 2].numpy().clip(panel["low"], panel["high"])
        np.testing.assert_allclose(read, expected, atol=0.51 * (panel["high"] - panel["low"]) / 254)
        assert frame["boxes"]["student"]["rows"][0][5] == 0.6 and len(frame["pictures"]) == 6
        assert frame["terms"]["feature"]["title"].startswith("feature: ")
        assert frame["maps"]["stages[1]|norm"][0]["shape"] == [16, 16]


def test_what_frames_share_is_stored_once(sample: Sample, grid: BEVGrid, tmp_path: Path) -> None:
    sights = sights_of(sample, grid)
    page = Page(write_replay(tmp_path / "r.html", sights, views=("norm",)))
    jpeg = page.frame(0)["pictures"][0]["jpeg"]
    assert page.frame(2)["pictures"][0]["jpeg"] == jpeg and page.text.count('id="chunk-') == 4
    assert sum(data.count(jpeg) for data in page.bytes.values()) <= 6  # six images that look alike, once for all frames


def test_parts_can_be_left_out(sample: Sample, grid: BEVGrid, tmp_path: Path) -> None:
    sights = sights_of(sample, grid, 1)
    options: dict[str, Any] = {"terms": (), "masks": False, "pictures": 0, "points": 0}
    page = Page(write_replay(tmp_path / "r.html", sights, **options))
    frame = page.frame(0)
    assert frame["pictures"] == [] and frame["terms"] == {} and frame["masks"] == {} and frame["points"] == b""
    alone = [replace(s, teacher=None, results={}) for s in sights]
    frame = Page(write_replay(tmp_path / "s.html", alone)).frame(0)
    assert [p["title"] for p in frame["maps"]["bev|norm"]] == ["student: bev, norm"] and frame["terms"] == {}


def test_the_page_stands_alone(sample: Sample, grid: BEVGrid, tmp_path: Path) -> None:
    text = write_replay(tmp_path / "r.html", sights_of(sample, grid, 1)).read_text()
    code = re.sub(r'<script type="application/.*?</script>', "", text, flags=re.S)
    assert "{{" not in code and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", code)
    assert not re.search(r"^import ", code, re.M) and not re.search(r'\b(?:src|href)="', code)
    names = re.findall(r"^(?:export )?(?:async )?(?:function|class|const|let) (\w+)", code, re.M)
    assert len(names) == len(set(names)) > 60  # two modules became one: no name is used twice


def test_main_directions_do_not_flip_from_frame_to_frame() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    turned = np.stack((255 - colours[..., 0], colours[..., 1], 255 - colours[..., 2]), -1)
    frames = [
        {"teacher": Layer("", colours)},
        {"teacher": Layer("", turned)},
        {"difference": Layer("", np.zeros((4, 4)))},
    ]
    replay._steady(frames)
    assert np.array_equal(frames[1]["teacher"].values, colours)


def test_clear_errors_and_no_half_file(
    sample: Sample, grid: BEVGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sights = sights_of(sample, grid, 2)
    path = tmp_path / "r.html"
    with pytest.raises(ValueError, match="no frames"):
        write_replay(path, [])
    with pytest.raises(ValueError, match="1 labels for 2 frames"):
        write_replay(path, sights, labels=["one"])
    with pytest.raises(ValueError, match="no BEV stage 'nothing'"):
        write_replay(path, sights, stages=("nothing",))
    with pytest.raises(ValueError, match=r"no term 'other' in any frame, only feature"):
        write_replay(path, sights, terms=("other",))
    monkeypatch.setattr(replay, "LIMIT", 50_000)
    with pytest.raises(ValueError, match=r"with 2 frames, the limit is 0.05 MB.*leave out: .*stage and view bev, pca"):
        write_replay(path, sights)
    assert not list(tmp_path.iterdir())
    assert len(feature_layers(sights[0], "bev", "norm")) == 3
