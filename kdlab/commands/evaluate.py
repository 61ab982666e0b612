"""`kdlab evaluate`."""

# No `from __future__ import annotations`: tyro reads the annotations of the options.
import csv
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdlab.commands.parse import parse

if TYPE_CHECKING:
    from kdlab.evaluate import Scorer
    from kdlab.metrics.boxes import EvalBoxes
    from kdlab.metrics.config import EvaluationConfig
    from kdlab.metrics.evaluation import Evaluation
    from kdlab.metrics.metrics import Metrics
    from kdlab.metrics.per_sample import SampleScores
    from kdlab.metrics.subset import Subset
    from kdlab.metrics.truth import Truth

TOLERANCE = 1e-9
"""Largest difference from nuscenes-devkit that counts as none."""

FRAMES = 10
"""Rows in the table of frames that differ."""


@dataclass(frozen=True)
class Options:
    """Words of the command."""

    run: tuple[Path, ...] = ()
    """Run folders, or shipped weights: their detectors are run, then scored."""
    result: Path | None = None
    """Result file in the nuScenes format, from any code; scored instead of runs."""
    data: Path | None = None
    """Data set; the runs' own where left out."""
    split: str | None = None
    """Split; the runs' validation split where left out."""
    version: str | None = None
    """Version folder; inferred where there is a single one."""
    config: Path | None = None
    """Evaluation settings, the devkit's JSON; those of the nuScenes detection challenge where left out."""
    scenes: tuple[str, ...] = ()
    """Subset: scene names."""
    distance: tuple[float, float] | None = None
    """Subset: distance from the ego vehicle in metres, from the first up to below the second."""
    visibility: tuple[Literal[1, 2, 3, 4], ...] = ()
    """Subset: nuScenes visibility levels of annotations, 1 (below 40 %) to 4 (above 80 %)."""
    points: tuple[float, float] | None = None
    """Subset: LiDAR and radar points in an annotation, from the first up to below the second, which may be inf."""
    time: Literal["day", "night"] | None = None
    """Subset: time of day, as the scenes' descriptions say."""
    rings: tuple[float, ...] = ()
    """Edges in metres of rings around the ego vehicle, such as 0 10 20 30 40 50: a table with a line for each."""
    by_sample: Path | None = None
    """Write scores of every sample to this CSV file."""
    against: Path | None = None
    """Another result file: table of the frames where the two differ most."""
    json: Path | None = None
    """Write the metrics to this file, under the names of the devkit's metrics_summary.json."""
    figures: Path | None = None
    """Folder for pictures: precision over recall, errors; also rings and frames that differ, where asked for."""
    official: bool = False
    """Score with nuscenes-devkit too and show both; exit code 1 where they differ."""
    out: Path | None = None
    """Folder for a run's metrics and results; the run folder where left out."""
    workers: int = 2
    """Loader processes."""
    cpu: bool = False
    """Run on the CPU although there is a GPU."""


def evaluate(args: Sequence[str]) -> int:
    """MAP, NDS and true-positive errors of runs, or of a nuScenes result file from any code."""
    given = parse(Options, "evaluate", args, str(evaluate.__doc__))
    _check(given)
    if given.result is not None:
        from kdlab.evaluate import Scorer

        scorer = Scorer(str(given.data), given.version)
        return _report(given, given.result, str(given.split), scorer)
    code = 0
    scorers: dict[tuple[str, str | None], Scorer] = {}
    for run in given.run:
        code = max(code, _run(given, run, scorers))
    return code


def _check(given: Options) -> None:
    """Say which options do not go together."""
    if bool(given.run) == (given.result is not None):
        raise ValueError("kdlab evaluate: name run folders with --run or a result file with --result, one of the two")
    if given.result is not None and (given.data is None or given.split is None):
        raise ValueError("--result wants --data (the data set) and --split (whose samples the file holds)")
    single = ("out", "json", "figures", "by_sample", "against")
    several = next((name for name in single if getattr(given, name) is not None), None)
    if len(given.run) > 1 and several is not None:
        raise ValueError(f"--{several.replace('_', '-')} goes with a single --run")
    if given.result is not None:
        for name in ("out", "workers", "cpu"):
            if getattr(given, name) != getattr(Options, name):
                raise ValueError(f"--{name} goes with --run")
    if given.rings and given.distance is not None:
        raise ValueError("--rings and --distance exclude each other: rings are distances")
    if given.rings and (len(given.rings) < 2 or sorted(set(given.rings)) != list(given.rings) or given.rings[0] < 0):
        raise ValueError("--rings wants two or more rising distances in metres, such as 0 10 20 30 40 50")
    if given.official and _subset(given) is not None:
        raise ValueError("--official compares the whole split: the devkit knows no subsets")
    if (given.by_sample or given.against) and (given.distance or given.visibility or given.points):
        raise ValueError("--by-sample and --against score whole samples: leave --distance, --visibility, --points out")


def _run(given: Options, run: Path, scorers: "dict[tuple[str, str | None], Scorer]") -> int:
    """Run a detector, store and print its metrics, and what else is asked for."""
    from kdlab.checkpoint import load_run_config
    from kdlab.evaluate import Scorer, evaluate_run

    data = load_run_config(run).data
    version = given.version if given.data or given.version else data.version
    place = (str(given.data or data.root), version)
    scorer = scorers[place] = scorers.get(place) or Scorer(*place)
    metrics = evaluate_run(
        run,
        place[0],
        given.split,
        version=place[1],
        device="cpu" if given.cpu else None,
        workers=given.workers,
        scorer=scorer,
        out=given.out,
    )
    print("\n".join([str(run), str(metrics), *_odd(metrics)]))
    extras = (given.rings, given.config, given.by_sample, given.against, given.json, given.figures, given.official)
    if not any(extras) and _subset(given) is None:
        return 0
    return _report(given, (given.out or run) / f"results_{metrics.split}.json", metrics.split, scorer)


def _odd(metrics: "Metrics") -> list[str]:
    """A line for each likely cause of odd numbers; none where nothing is odd."""
    from kdlab.evaluate import diagnose

    return [f"odd ({finding.sure}): {finding.cause}" for finding in diagnose(metrics)]


def _subset(given: Options) -> "Subset | None":
    """The part of the split that the options name; None for all of it."""
    from kdlab.metrics.subset import Subset

    subset = Subset(
        scenes=given.scenes or None,
        distance=given.distance,
        visibility=given.visibility or None,
        points=given.points,
        time=given.time,
    )
    return None if subset == Subset() else subset


def _report(given: Options, path: Path, split: str, scorer: "Scorer") -> int:
    """Score a result file and print, write and draw what is asked for; returns the exit code."""
    from kdlab.evaluate import Scorer
    from kdlab.metrics.config import EvaluationConfig

    if given.against is not None and given.against.resolve() == path.resolve():
        raise ValueError(f"--against {given.against}: that is the very file that is scored; name another one")
    if given.config is not None:
        scorer = Scorer(scorer.root, scorer.version, EvaluationConfig.from_file(given.config))
    scorer.truth(split)  # its reading is not part of the devkit's eval_time
    began = time.perf_counter()
    boxes = scorer.boxes(path, split)
    evaluation = scorer.score(boxes, split, _subset(given))
    seconds = time.perf_counter() - began
    conditions = _conditions(given)
    if given.result is not None or conditions:
        odd = [] if conditions else _odd(evaluation.metrics)  # a subset's numbers are odd by what was left out
        print("\n".join([str(path), *conditions, str(evaluation.metrics), *odd]))
    if given.json is not None:
        summary = evaluation.metrics.summary(scorer.config, seconds, boxes.meta)
        _write_summary(given.json, {**summary, "kdlab": _origin(evaluation.metrics, _subset(given))})
    results = {_names(path, given.against)[0]: boxes}
    if given.against is not None:
        results[_names(path, given.against)[1]] = scorer.boxes(given.against, split)
    rings = _rings(given, scorer, results, split)
    frames = _frames(given, scorer, results, split)
    if given.figures is not None:
        _draw(given.figures, evaluation, scorer.config, rings, frames)
    return _compare(path, split, scorer, evaluation.metrics) if given.official else 0


def _conditions(given: Options) -> list[str]:
    """What makes the numbers others than the official ones of the split: one line, or none."""
    words = {
        "scenes": " ".join(given.scenes),
        "distance": given.distance and "{:g} to {:g} m".format(*given.distance),
        "visibility": " ".join(map(str, given.visibility)),
        "points": given.points and "{:g} to {:g}".format(*given.points),
        "time of day": given.time,
        "settings": given.config,
    }
    named = [f"{name} {value}" for name, value in words.items() if value]
    return ["not the official numbers of the split: " + ", ".join(named)] if named else []


def _names(path: Path, other: Path | None) -> tuple[str, str]:
    """Short names of two result files: those of their folders where the files are called the same."""
    if other is None or path.stem != other.stem:
        return path.stem, "" if other is None else other.stem
    first, second = path.resolve().parent.name, other.resolve().parent.name
    return (first, second) if first != second else (str(path), str(other))


def _origin(metrics: "Metrics", subset: "Subset | None") -> dict[str, Any]:
    """What the devkit's summary does not say: of which data the numbers are. Its own reader leaves this out."""
    return {
        "split": metrics.split,
        "subset": None if subset is None else str(subset),
        "samples": metrics.samples,
        "counts": metrics.counts,
        "data": metrics.data,
    }


def _write_summary(path: Path, summary: dict[str, Any]) -> None:
    from kdlab.checkpoint import replacing

    text = json.dumps(summary, indent=2) + "\n"  # NaN as the devkit writes it, for whatever reads its files
    with replacing(path) as part:
        part.write_text(text)


def _rings(
    given: Options, scorer: "Scorer", results: "Mapping[str, EvalBoxes]", split: str
) -> "dict[str, dict[tuple[float, float], Metrics]]":
    """Metrics of each result by ring, printed; nothing where no rings are asked for."""
    from kdlab.evaluate import of_present
    from kdlab.metrics.evaluation import evaluate as score
    from kdlab.metrics.subset import Subset

    edges, found = list(zip(given.rings[:-1], given.rings[1:], strict=True)), {}
    subset, truth, config = _subset(given) or Subset(), scorer.truth(split), scorer.config
    for name, boxes in results.items() if edges else ():
        by_ring = {}
        for ring in edges:
            within = replace(subset, distance=ring)
            by_ring[ring] = of_present(score(truth, boxes, config, within, allow_empty=True).metrics, config)
        print(f"\n{name} by distance from the ego vehicle, means over the classes that are there")
        print(ring_table(by_ring))
        found[name] = by_ring
    return found


def ring_table(by_ring: "Mapping[tuple[float, float], Metrics]") -> str:
    """Metrics by ring as text, a line for each."""
    from kdlab.evaluate import TP_ERRORS

    columns = ["mAP", "NDS", *TP_ERRORS.values()]
    lines = [f"  {'ring':12s} {'boxes':>6s} {'classes':>7s} " + " ".join(f"{name:>6s}" for name in columns)]
    for (low, high), metrics in by_ring.items():
        values = (metrics.mean_ap, metrics.nd_score, *metrics.tp_errors.values())
        counts = f"{sum(metrics.counts.values()):6d} {len(metrics.present):7d}"
        lines.append(f"  {f'{low:g} to {high:g} m':12s} {counts} " + " ".join(_number(value) for value in values))
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{'-':>6s}" if math.isnan(value) else f"{value:6.3f}"


def _frames(
    given: Options, scorer: "Scorer", results: "Mapping[str, EvalBoxes]", split: str
) -> "dict[str, dict[str, float]]":
    """AP by result of the frames where two results differ most, printed; writes the scores of all samples."""
    from kdlab.metrics.per_sample import sample_scores
    from kdlab.metrics.subset import Subset

    if given.by_sample is None and given.against is None:
        return {}
    truth = scorer.truth(split)
    chosen = (_subset(given) or Subset()).samples(truth)
    scores = {name: sample_scores(truth, boxes, scorer.config) for name, boxes in results.items()}
    if given.by_sample is not None:
        _write_scores(given.by_sample, truth, scores, chosen)
    if given.against is None:
        return {}
    (here, ours), (there, theirs) = scores.items()
    width = max(len(here), len(there), 9)
    print(f"\nthe frames where {here} and {there} differ most, by AP of the frame")
    print(f"  {'scene':12s} {'sample':32s} {here:>{width}s} {there:>{width}s} difference")
    frames = {}
    differences = [(token, value) for token, value in ours.difference(theirs) if chosen[truth.index[token]]]
    for token, value in differences[:FRAMES]:
        place = truth.index[token]
        frames[f"{truth.scene[place]}, {token[:8]}"] = {here: float(ours.ap[place]), there: float(theirs.ap[place])}
        print(
            f"  {truth.scene[place]:12s} {token:32s} {ours.ap[place]:{width}.3f} {theirs.ap[place]:{width}.3f}"
            f" {value:+10.3f}"
        )
    return frames


def _write_scores(path: Path, truth: "Truth", scores: "Mapping[str, SampleScores]", chosen: Any) -> None:
    """A CSV row for every sample and result."""
    from kdlab.checkpoint import replacing

    columns = ("ap", "true_positives", "false_positives", "misses")
    with replacing(path) as part, part.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["result", "scene", "sample", *columns])
        for name, found in scores.items():
            for i in chosen.nonzero()[0]:
                values = [getattr(found, column)[i] for column in columns]
                table.writerow([name, truth.scene[i], truth.tokens[i], *values])


def _draw(
    folder: Path,
    evaluation: "Evaluation",
    config: "EvaluationConfig",
    rings: "Mapping[str, Mapping[tuple[float, float], Metrics]]",
    frames: "Mapping[str, Mapping[str, float]]",
) -> None:
    """Write the pictures of an evaluation as PNG."""
    from kdlab.view.results.evaluation import error_curves, frame_differences, precision_recall, ring_scores

    pictures = {
        "precision_recall": precision_recall(evaluation, config),
        "errors": error_curves(evaluation, config),
    }
    if rings:
        pictures["rings"] = ring_scores(rings)
    if frames:
        pictures["frames"] = frame_differences(frames)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png")
    print(f"\ndrawn in {folder}: {', '.join(f'{name}.png' for name in pictures)}")


def _compare(path: Path, split: str, scorer: "Scorer", ours: "Metrics") -> int:
    """Print the devkit's numbers beside ours; 1 where they differ. Our time holds all of our reading."""
    from kdlab.evaluate import Scorer
    from kdlab.metrics.metrics import TP_ERRORS
    from kdlab.official import devkit_tables, largest_difference, timed_official

    began = time.perf_counter()
    Scorer(scorer.root, scorer.version, scorer.config).score(path, split)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    tables = devkit_tables(scorer.root, scorer.version)
    opening = time.perf_counter() - began
    theirs, devkit = timed_official(path, scorer.root, split, config=scorer.config, tables=tables)
    difference = largest_difference(ours, theirs)
    print(f"\n  {'':6s} {'kdlab':>20s} {'nuscenes-devkit':>20s}")
    rows = {"mAP": (ours.mean_ap, theirs.mean_ap), "NDS": (ours.nd_score, theirs.nd_score)}
    rows |= {short: (ours.tp_errors[key], theirs.tp_errors[key]) for key, short in TP_ERRORS.items()}
    for name, values in rows.items():
        print(f"  {name:6s} " + " ".join(f"{value:20.16f}" for value in values))
    print(f"largest difference of all numbers, by class and distance too: {difference:.1e}")
    print(
        f"from files to metrics: kdlab {seconds:.2f} s, its tables included; devkit {devkit:.2f} s "
        f"({devkit / seconds:.1f} times as long), after {opening:.2f} s for its tables"
    )
    if difference > TOLERANCE:
        print(f"THEY DIFFER by more than {TOLERANCE:g}")
        return 1
    return 0
