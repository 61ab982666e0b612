"""Reading a result file: in pieces, by Python's rules of JSON, and what is refused."""

import json
import math
import re
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_cases import Case, both, box, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlab.metrics.boxes import COLUMNS, EvalBoxes
from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.evaluation import evaluate
from kdlab.metrics.per_sample import sample_scores
from kdlab.metrics.results import read_results
from kdlab.metrics.stream import JsonStream
from kdlab.metrics.truth import Truth


def assert_same(a: EvalBoxes, b: EvalBoxes) -> None:
    assert {f.name for f in fields(EvalBoxes)} == {*COLUMNS, "meta", "of"} and (a.meta, a.of) == (b.meta, b.of)
    for name in COLUMNS:
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype == (np.float64 if left.dtype.kind == "f" else np.int64)
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("chunk", [1, 3, 17, 1000])
@pytest.mark.parametrize("indent", [None, 1])
def test_pieces_give_the_same_columns(tmp_path: Path, chunk: int, indent: int | None) -> None:
    case = random_case(3, samples=6, odd=0.3)
    truth, path = case.truth(), tmp_path / "r.json"
    extra = {
        "before": [[{"results": "}]"}]],
        "meta": {"use_lidar": True},
        "results": case.results,
        "after": [1, {}, ""],
    }
    path.write_text(json.dumps(extra, indent=indent))
    whole = read_results(path, truth)
    assert len(whole) == sum(map(len, case.results.values())) > 20 and whole.meta == {"use_lidar": True}
    assert_same(read_results(path, truth, chunk=chunk), whole)


def test_columns_hold_what_the_file_holds(tmp_path: Path) -> None:
    more = {"sample_token": "s1", "velocity": [math.nan, 2], "attribute_name": "cycle.with_rider", "num_pts": 7}
    first = box(0.1, 1e-300, "bus", 0.1 + 0.2, rotation=[1, 2, 3, 4.5], size=[True, 2, 3], **more)
    case = Case({"s0": [box(0, 0)], "s1": []}, {"s1": [], "s0": [first, box(1, 2, sample_token="x")]})
    boxes = read_results(case.write(tmp_path / "r.json"), case.truth())
    assert boxes.sample.tolist() == [0, 0] and boxes.owner.tolist() == [1, -1]
    assert boxes.translation.tolist() == [[0.1, 1e-300, 0], [1, 2, 0]] and boxes.size[0].tolist() == [1, 2, 3]
    assert boxes.rotation[0].tolist() == [1, 2, 3, 4.5] and boxes.score.tolist() == [0.1 + 0.2, 0.5]
    assert math.isnan(boxes.velocity[0, 0]) and boxes.label.tolist() == [3, 0]
    assert boxes.attribute.tolist() == [3, -1] and boxes.points.tolist() == [7, -1]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.just('}] "\\'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), VALUES, max_size=5), st.integers(1, 40), st.sampled_from([None, 0, 2]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_stream_reads_what_json_reads(
    value: dict[str, Any], chunk: int, indent: int | None, ascii_only: bool
) -> None:
    import io

    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    stream = JsonStream(io.BytesIO(text.encode(errors="surrogatepass")), Path("x"), chunk)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    found = {key: stream.value() for key in stream.members()}
    stream.finish()
    assert repr(found) == repr(value) or json.dumps(found) == json.dumps(value)


def test_the_last_of_equal_keys_wins_in_the_place_of_the_first(tmp_path: Path) -> None:
    case = Case({"s0": [box(0, 0)], "s1": [box(0, 0)]}, {}, predefined=True)
    one, two, other = (json.dumps([box(i, 0, sample_token=t)]) for i, t in ((1, "s0"), (2, "s0"), (3, "s1")))
    path = tmp_path / "r.json"
    path.write_text(
        f'{{"results": {{}}, "meta": 1, "results": {{"s0": {one}, "s1": {other}, "s0": {two}}}, "meta": {{"a": 2}}}}'
    )
    boxes = read_results(path, case.truth())
    assert boxes.translation[:, 0].tolist() == [2, 3] and boxes.meta == {"a": 2}
    assert case.devkit(path)[0].mean_ap >= 0


def test_order_of_samples(tmp_path: Path) -> None:
    samples = {t: [box(i, 0, sample_token=t)] for i, t in enumerate("abc")}
    given = {t: samples[t] for t in "cab"}
    for predefined, expected in ((True, [2, 0, 1]), (False, [0, 1, 2])):
        case = Case(samples, given, predefined=predefined)
        assert read_results(case.write(tmp_path / "r.json"), case.truth()).sample.tolist() == expected


def test_a_custom_split_leaves_other_samples_out(tmp_path: Path) -> None:
    case = Case({"s0": [box(0, 0)]}, {"other": [{"nothing": "of a box"}] * 600, "s0": [box(0, 0)]})
    assert both(case, tmp_path / "r.json").metrics.label_aps["car"]["0.5"] == pytest.approx(1)


def test_empty_values_hold_no_boxes(tmp_path: Path) -> None:
    case = Case({t: [box(0, 0)] for t in "abcd"}, {"a": [], "b": {}, "c": "", "d": [box(0, 0, sample_token="d")]})  # type: ignore[dict-item]
    assert both(case, tmp_path / "r.json").metrics.counts["car"] == 4


def refused(path: Path, truth: Truth, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_results(path, truth)
    assert str(path) in str(caught.value)


WRONG = {
    "translation": [
        ([1, 2], "translation has 2 numbers, needs 3"),
        (5, "translation is 5, not a list of 3 numbers"),
        ([1, None, 2], "translation holds None, which is not a number"),
        ([1, "2", 3], "translation holds '2', which is not a number"),
        ([1, math.nan, 2], "translation holds NaN"),
        ("123", "translation is '123', not a list"),
        ([[1], [2], [3]], r"translation holds \[1\], which"),
    ],
    "size": [([1, 2, 3, 4], "size has 4 numbers, needs 3"), ([math.nan] * 3, "size holds NaN")],
    "rotation": [([1, 0, 0], "rotation has 3 numbers, needs 4"), ([math.nan] * 4, "rotation holds NaN")],
    "velocity": [([1, 0, 0], "velocity has 3 numbers, needs 2"), (None, "velocity is None, not a list of 2 numbers")],
    "ego_translation": [
        ([1, 0], "ego_translation has 2 numbers, needs 3"),
        ([math.nan] * 3, "ego_translation holds NaN"),
    ],
    "detection_name": [
        ("van", "detection_name 'van' is none of the ten classes"),
        (["car"], r"detection_name \['car'\]"),
    ],
    "attribute_name": [
        ("parked", "attribute_name 'parked' is no nuScenes attribute"),
        (None, "attribute_name None is no"),
    ],
    "detection_score": [
        (math.nan, "detection_score is NaN"),
        ("high", "detection_score is 'high', which is not a number"),
        ([0.5], r"detection_score is \[0\.5\]"),
        ("nan", "detection_score is NaN"),
    ],
    "num_pts": [(math.nan, "num_pts is nan, which is not"), (None, "num_pts is None, which is not a number")],
    "sample_token": [(3, "sample_token is 3, not a string")],
}


@pytest.mark.parametrize(("key", "value", "message"), [(k, *each) for k, many in WRONG.items() for each in many])
def test_a_wrong_box_is_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    boxes = [box(i, 0) for i in range(5)]
    boxes[3][key] = value
    case = Case({"s0": [box(i, 0) for i in range(5)]}, {"s0": boxes})
    path = case.write(tmp_path / "r.json")
    name = re.escape(str(boxes[3]["detection_name"]))
    refused(path, case.truth(), rf"sample 's0', box 3 \({name}\): {message}")
    with pytest.raises((AssertionError, TypeError, ValueError, KeyError)):
        case.devkit(path)


@pytest.mark.parametrize(("key", "value"), [
    ("translation", [[0], [0], [0]]), ("translation", [[], [], []]), ("size", [[1, 1], [1, 1], [1, 1]]),
    ("size", [[1], 1, 1]), ("rotation", [[1], [0], [0], [0]]), ("velocity", [[0], [0]]), ("velocity", [None, None]),
    ("ego_translation", [[0], [0], [0]]), ("translation", [10**30, 0, {}]),
])  # fmt: skip
@pytest.mark.parametrize("boxes", [1, 3])
@pytest.mark.parametrize("everywhere", [False, True])
def test_lists_in_lists_are_refused(tmp_path: Path, key: str, value: Any, boxes: int, everywhere: bool) -> None:
    case = Case({"s0": [box(i, 0) for i in range(3)]}, {"s0": [box(i, 0) for i in range(boxes)]})
    for wrong in case.results["s0"] if everywhere else case.results["s0"][-1:]:
        wrong[key] = value
    first = 0 if everywhere else boxes - 1
    message = rf"sample 's0', box {first} \(car\): {key} holds .*not a number"
    refused(case.write(tmp_path / "r.json"), case.truth(), message)


def test_integers_of_more_than_64_bits_are_floats(tmp_path: Path) -> None:
    case = Case({"s0": [box(0, 0)]}, {"s0": [box(10**30, -(2**63))]})
    boxes = read_results(case.write(tmp_path / "r.json"), case.truth())
    assert boxes.translation.tolist() == [[1e30, -(2.0**63), 0]]
    case.results["s0"][0] |= {"num_pts": 2**64}
    refused(case.write(tmp_path / "r.json"), case.truth(), "num_pts is 1.8446744073709552e\\+19, which is not a number")


def test_boxes_know_their_samples(tmp_path: Path) -> None:
    case = Case({"s0": [box(0, 0)], "s1": []}, {"s0": [], "s1": []})
    truth = case.truth()
    boxes = read_results(case.write(tmp_path / "r.json"), truth)
    assert boxes.of == truth.name and len({truth.name, Case({"s1": [], "s0": [box(0, 0)]}, {}).truth().name}) == 2
    other = Case({"s1": [box(0, 0)], "s2": []}, {}).truth()
    for score in (evaluate, sample_scores):
        score(truth, boxes)
        with pytest.raises(ValueError, match=r"read for split 'own' of v1\.0-made, samples \w+, not for split 'own'"):
            score(other, boxes)
        score(other, replace(boxes, of=""))


@pytest.mark.parametrize("key", ["sample_token", "translation", "size", "rotation", "velocity", "detection_name",
                                 "attribute_name"])  # fmt: skip
def test_a_missing_field_is_named(tmp_path: Path, key: str) -> None:
    case = Case({"s0": [box(0, 0)]}, {"s0": [box(0, 0), box(1, 1)]})
    del case.results["s0"][1][key]
    path = case.write(tmp_path / "r.json")
    refused(path, case.truth(), rf"sample 's0', box 1.*: has no field '{key}'")
    with pytest.raises(KeyError):
        case.devkit(path)


@pytest.mark.parametrize(("boxes", "message"), [
    ([3], r"sample 's0', box 0: is 3 where an object was expected"),
    ([box(0, 0), None], r"sample 's0', box 1: is None where an object"),
    ({"a": 1}, r"sample 's0' holds \{'a': 1\} where a list of boxes was expected"),
    (None, r"sample 's0' holds None where a list"),
    ("boxes", r"sample 's0' holds 'boxes' where a list"),
    ([box(0, 0)] * 501, r"sample 's0' has 501 boxes; nuScenes allows 500"),
])  # fmt: skip
def test_a_wrong_list_is_named(tmp_path: Path, boxes: Any, message: str) -> None:
    case = Case({"s0": [box(0, 0)]}, {"s0": boxes})
    path = case.write(tmp_path / "r.json")
    refused(path, case.truth(), message)
    with pytest.raises((AssertionError, TypeError, ValueError, AttributeError)):
        case.devkit(path)


def test_the_limit_of_boxes_is_a_setting(tmp_path: Path) -> None:
    case = Case({"s0": [box(0, 0)]}, {"s0": [box(0, 0)] * 501})
    assert (
        len(read_results(case.write(tmp_path / "r.json"), case.truth(), EvaluationConfig(max_boxes_per_sample=600)))
        == 501
    )


@pytest.mark.parametrize("predefined", [False, True])
def test_missing_and_unknown_samples(tmp_path: Path, predefined: bool) -> None:
    case = Case({"s0": [box(0, 0)], "s1": []}, {"s0": []}, predefined=predefined)
    path = case.write(tmp_path / "r.json")
    refused(path, case.truth(), r"1 of the 2 samples of split '(own|val)' of v1.0-\w+ are missing, such as 's1'")
    case.results |= {"s1": [], "s2": []}
    case.write(path)
    if predefined:
        refused(path, case.truth(), r"sample 's2' is not of split 'val' of v1\.0-trainval")
        with pytest.raises(AssertionError, match="doesn't match"):
            case.devkit(path)


GOOD = b'{"meta": {}, "results": {"s0": [%s]}}' % json.dumps(box(0, 0)).encode()


@pytest.mark.parametrize(("content", "message"), [
    (b"", r"at byte 0: the file is empty; an object was expected"),
    (b"  \n", r"at byte 3: the file ends here"),
    (b"[]", "at byte 0: an object was expected"),
    (b"\xef\xbb\xbf" + GOOD, "at byte 0: an object was expected"),
    (b"PK\x03\x04 an archive", "at byte 0: an object was expected"),
    (GOOD[:-1], f"at byte {len(GOOD) - 1}: the file ends here; a comma"),
    (GOOD[:-3], f"at byte {len(GOOD) - 3}: the file ends here, before its data do"),
    (GOOD[:90], "at byte 90: the file ends here, before its data do"),
    (GOOD[:29], "at byte 29: the file ends here; a colon was expected"),
    (GOOD[:28], "at byte 28: the file ends here, before its data do"),
    (GOOD + b"}", f"at byte {len(GOOD)}: nothing more was expected"),
    (GOOD.replace(b'"size":', b'"size"'), "at byte 90: Expecting ':' delimiter"),
    (GOOD.replace(b'"s0": [{', b'"s0" [{'), "at byte 30: a colon was expected"),
    (GOOD.replace(b'"meta": {}, ', b'"meta": {} '), "at byte 12: a comma or a closing brace was expected"),
    (GOOD.replace(b'"meta": {}, ', b'"meta": {},, '), "at byte 12: a key in quotes was expected"),
    (GOOD.replace(b'"meta": {}', b'"meta": nul'), "at byte 9: Expecting value"),
    (GOOD.replace(b"car", b"c\xffr"), r"at byte \d+: no UTF-8 text"),
    (b'{"meta": {}}', "no field 'results'; a nuScenes result file is an object with 'meta' and 'results'"),
    (b'{"results": {"s0": []}}', "no field 'meta'"),
    (b'{"meta": {}, "results": []}', "'results' is not an object of sample tokens"),
    (b'{"meta": {}, "results": null}', "'results' is not an object of sample tokens"),
    (b'{"meta": ' + b"[" * 100_000 + b"]" * 100_000 + b', "results": {"s0": []}}', "nested too deeply"),
])  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    case = Case({"s0": [box(0, 0)]}, {})
    path = tmp_path / "r.json"
    path.write_bytes(content)
    for chunk in (5, 1 << 20):
        with pytest.raises(ValueError, match=message) as caught:
            read_results(path, case.truth(), chunk=chunk)
        assert str(path) in str(caught.value)
    with pytest.raises((AssertionError, ValueError, TypeError, AttributeError, KeyError, RecursionError)):
        case.devkit(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such result file"):
        read_results(tmp_path / "none.json", Case({"s0": [box(0, 0)]}, {}).truth())


def test_memory_does_not_grow_with_what_is_skipped(tmp_path: Path) -> None:
    boxes = [box(i, 0) for i in range(300)]
    case = Case({"s0": [box(0, 0)]}, {**{f"x{i}": boxes for i in range(60)}, "s0": boxes})
    path = case.write(tmp_path / "r.json")
    truth = case.truth()
    tracemalloc.start()
    read_results(path, truth, chunk=1 << 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 2
