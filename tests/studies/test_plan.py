"""What a study expands to, in Python and from TOML."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from mini_run import mini_config

from kdlab.config import DistillConfig, RunConfig, load_config, save_config
from kdlab.data.simulate_config import SimulationConfig
from kdlab.presets import SCALES, tiny
from kdlab.studies import Change, Study, expand, load_study, term_changes
from kdlab.studies.load import plain_study
from kdlab.studies.plan import Terms, trial_hash, unique
from kdlab.studies.worlds import world_ready

TERMS = ("feature", "relation", "response_class", "response_regression")
KD = {"distill.method": "unidistill", "distill.teacher": "runs/teacher"}


def study(*changes: Change, **values: Any) -> Study:
    given = {"name": "s", "base": tiny("camera"), "seeds": (0, 1), "split": "sim_val", "out": Path("runs/s"), **values}
    return Study(changes=changes, **given)


def config(values: dict[str, Any], base: RunConfig | None = None) -> RunConfig:
    return expand(study(Change("c", values), base=base or tiny("camera")))[1].config


def test_all_changes_of_a_seed_before_the_next_seed() -> None:
    trials = expand(study(Change("slow", {"train.lr": 1e-4}), Change("kd", KD)))
    assert [(t.change, t.seed, t.config.train.seed) for t in trials] == [
        (name, seed, seed) for seed in (0, 1) for name in ("base", "slow", "kd")
    ]
    assert trials[1].folder == Path(f"runs/s/slow/seed0-{trial_hash(trials[1].config)}")
    run = str(trials[1].folder)
    assert trials[1].command == ("kdlab", "train", f"{run}/config.json", "--out", run)
    assert trials[1].evaluation == ("kdlab", "evaluate", "--run", run, "--split", "sim_val", "--workers", "2")
    assert expand(study(cpu=True))[0].command[-1] == "--cpu"
    assert len({t.folder for t in trials}) == 6


def test_the_hash_is_of_what_decides_the_numbers() -> None:
    base = tiny("camera")
    other = replace(base, data=replace(base.data, workers=7), train=replace(base.train, evaluate_every=1))
    assert trial_hash(other) == trial_hash(base) and len(trial_hash(base)) == 8
    assert trial_hash(replace(base, data=replace(base.data, root="x"))) != trial_hash(base)


def test_equal_configs_share_a_run(tmp_path: Path) -> None:
    same = study(Change("same", {}), Change("workers", {"data.workers": 0}), Change("lr", {"train.lr": 1.0}))
    trials = expand(same)
    assert [t.folder.parent.name for t in trials[:4]] == ["base", "base", "base", "lr"]
    assert [t.change for t in unique(trials)] == ["base", "lr", "base", "lr"]
    # A renamed change finds the run that it made under its old name.
    old = tmp_path / "lr" / trials[3].folder.name
    old.mkdir(parents=True)
    renamed = expand(study(Change("rate", {"train.lr": 1.0}), out=tmp_path))
    assert [t.folder.parent.name for t in renamed] == ["base", "lr", "base", "rate"]


def test_a_run_of_an_earlier_version_is_found_by_its_config(tmp_path: Path) -> None:
    of = study(Change("lr", {"train.lr": 1.0}), out=tmp_path, seeds=(0,))
    new = expand(of)[1]
    old = tmp_path / "lr" / "seed0-00c0ffee"
    old.mkdir(parents=True)
    save_config(new.config, old / "config.json")
    plain = json.loads((old / "config.json").read_text())
    plain["train"].pop("ema")  # a field that came later, with a default
    plain["data"]["workers"] = 7  # does not count
    (old / "config.json").write_text(json.dumps(plain))
    assert expand(of)[1].folder == old
    shutil.copytree(old, new.folder)
    (old / "detector.safetensors").write_text("weights")
    assert expand(of)[1].folder == old  # finished
    (new.folder / "detector.safetensors").write_text("weights")
    assert expand(of)[1].folder == new.folder
    other = study(Change("lr", {"train.lr": 2.0}), out=tmp_path, seeds=(0,))
    assert expand(other)[1].folder not in (old, new.folder)


def test_changes_name_what_they_are_judged_against(tmp_path: Path) -> None:
    text = TOML + '[changes.both]\nbase = "unidistill"\ntrain.lr = 1.0\n'
    loaded = load_study(written(tmp_path, text), tmp_path / "s")
    assert [c.base for c in loaded.changes] == ["base", "base", "unidistill"]
    for wrong in ("both", "none"):
        with pytest.raises(ValueError, match=f"changes.both: base '{wrong}' is not one of base, unidistill"):
            load_study(written(tmp_path, text.replace('base = "unidistill"', f'base = "{wrong}"')))
    with pytest.raises(ValueError, match=r"changes.both: base: expected the name of a change, got 3"):
        load_study(written(tmp_path, text.replace('base = "unidistill"', "base = 3")))
    whole, *without = term_changes(tiny("camera"), "each-off", "unidistill", "t")
    assert whole.base == "base" and {c.base for c in without} == {"unidistill"}


def test_the_folder_keeps_references_terms_and_the_cpu(tmp_path: Path) -> None:
    shorthand = '[terms]\nmode = "each-off"\nmethod = "unidistill"\nteacher = "t"\nterms = ["feature"]\n'
    path = written(tmp_path, TOML.partition("[changes")[0] + shorthand)
    begun = replace(load_study(path, tmp_path), cpu=True)
    (tmp_path / "study.json").write_text(json.dumps(plain_study(begun)))
    assert load_study(tmp_path) == begun and begun.terms == Terms("each-off", "unidistill", "t", ("feature",))
    assert load_study(path, tmp_path).cpu and not load_study(path, tmp_path / "other").cpu


def test_changes_set_values_by_dotted_key() -> None:
    changed = config({"detector.grid.cell": 3.2, "data.augment.resize": [0.0, 0.1], "train.epochs": 3})
    assert (changed.detector.grid.cell, changed.data.augment.resize, changed.train.epochs) == (3.2, (0.0, 0.1), 3)


def test_a_distillation_starts_from_the_presets_scales() -> None:
    scales = SCALES["tiny", "unidistill"]
    assert config(KD).distill == DistillConfig("unidistill", "runs/teacher", scales=scales)
    changed = config(
        {**KD, "distill.weights.feature": 0, "distill.scales.relation": 1.0, "distill.variant": "released"}
    )
    assert changed.distill == DistillConfig(
        "unidistill", "runs/teacher", "released", scales={**scales, "relation": 1.0}, weights={"feature": 0.0}
    )
    wide = tiny("camera")
    wide = replace(wide, detector=replace(wide.detector, bev=replace(wide.detector.bev, channels=80)))
    assert config(KD, wide).distill == DistillConfig("unidistill", "runs/teacher")
    own = replace(tiny("camera"), distill=DistillConfig("unidistill", "t", scale=2.0))
    assert config({"distill.method": "unidistill"}, own) == own
    assert config({"distill.method": "none"}, own).distill is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train.rate": 1}, r"changes.c: unknown key 'train.rate'; known in train: epochs"),
        ({"trian.lr": 1}, r"changes.c: unknown key 'trian.lr'"),
        ({"train.lr.x": 1}, r"changes.c: unknown key 'train.lr.x'"),
        ({"train.lr": "fast"}, r"changes.c: RunConfig.train.lr: expected float, got 'fast'"),
        ({"train.epochs": True}, r"changes.c: RunConfig.train.epochs: expected int"),
        ({"distill.method": "magic"}, r"changes.c: distill.method: unknown method 'magic'; known: unidistill"),
        ({**KD, "distill.weights.colour": 0.0}, r"changes.c: .*unknown term 'colour'; known: feature"),
        ({**KD, "distill.quirks": ["x"]}, r"changes.c: .*unknown quirk 'x'"),
        ({"distill.scale": 2.0}, r"changes.c: distill.scale: this run has no distillation; set distill.method"),
        ({"train.seed": 1}, r"changes.c: train.seed comes from the study's seeds"),
        ({"simulation.fog": 1.0}, r"changes.c: no data set at"),
    ],
)
def test_changes_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        config(values)


def test_studies_that_cannot_be() -> None:
    for values, message in (
        ({"seeds": ()}, "seeds: a study wants at least one"),
        ({"seeds": (1, 1)}, "seeds: 1 is there twice"),
        ({"changes": (Change("a", {}), Change("a", {}))}, "changes: 'a' is there twice"),
        ({"changes": (Change("a/b", {}),)}, "name 'a/b': take letters"),
        ({"changes": (Change("worlds", {}),)}, "name 'worlds'"),
        ({"changes": (Change("base", {"train.lr": 1.0}),)}, "unchanged base's; take another"),
        ({"name": ".."}, "name '..'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(study(), **values)  # type: ignore[arg-type]


def test_terms() -> None:
    base = tiny("camera")

    def off(changes: tuple[Change, ...]) -> dict[str, list[str]]:
        heads = "distill.weights."
        return {c.name: [k.removeprefix(heads) for k in c.set if k.startswith(heads)] for c in changes}

    def others(*names: str) -> list[str]:
        return [t for t in TERMS if t not in names]

    assert off(term_changes(base, "each-off", "unidistill", "t")) == {
        "unidistill": [], **{f"without-{t}": [t] for t in TERMS}
    }  # fmt: skip
    assert off(term_changes(base, "each-alone", "unidistill", "t", ["relation"])) == {
        "unidistill": [], "only-relation": others("relation")
    }  # fmt: skip
    assert off(term_changes(base, "subsets", "unidistill", "t", ["relation", "feature"])) == {
        "feature": others("feature"), "relation": others("relation"), "feature+relation": others("feature", "relation")
    }  # fmt: skip
    assert len(term_changes(base, "subsets", "unidistill", "t")) == 15
    own = replace(base, distill=DistillConfig("unidistill", "t"))
    whole, *without = term_changes(own, "each-off")
    assert config(dict(whole.set), own) == own and len(without) == 4
    assert term_changes(own, "subsets")[0] == Change("no-terms", {"distill.method": "none"})
    for args, message in (
        (("each-off",), "method: the base has no distillation"),
        (("some", "unidistill"), "mode: 'some' is not one of each-off"),
        (("subsets", "unidistill", "t", ["colour"]), "unknown term 'colour'; known: feature"),
        (("subsets", "unidistill", "t", ["feature", "feature"]), "is there twice"),
        (("each-off", "magic"), "unknown method 'magic'"),
    ):
        with pytest.raises(ValueError, match=message):
            term_changes(base, *args)  # type: ignore[arg-type]


def test_students_that_only_the_method_made_different_are_not_compared() -> None:
    def changes(*pairs: tuple[str, dict[str, Any]], base: str = "base") -> Study:
        return study(*(Change(name, values, base if i else "base") for i, (name, values) in enumerate(pairs)))

    method, student = (
        {"distill.method": "simdistill", "distill.teacher": "t"},
        {"detector.camera.simulated_lidar": True},
    )
    with pytest.raises(ValueError, match=r"changes.sim: the student has detector.camera.simulated_lidar true, that"):
        expand(changes(("sim", method)))
    right = changes(("student", student), ("sim", method), base="student")
    with pytest.raises(ValueError, match=r"changes.alone: the student has .* false, that of 'sim', which it is judged"):
        expand(replace(right, changes=(*right.changes, Change("alone", {"distill.method": "none"}, "sim"))))
    assert {t.config.detector.camera.simulated_lidar for t in expand(right) if t.change != "base"} == {True}
    asked = changes(("sim", student | method), ("shared", method | {"distill.quirks": ["simdistill.shared_lift"]}),
                    base="sim")  # fmt: skip
    assert expand(asked)[2].config.detector.camera.shared_lift
    with pytest.raises(ValueError, match=r"changes.released: the student has detector.camera.[a-z_]+ true"):
        expand(changes(("sim", student | method), ("released", method | {"distill.variant": "released"}), base="sim"))


def test_terms_of_a_method_with_another_student() -> None:
    base, some = tiny("camera"), ["fusion", "cross_modal"]
    for mode in ("each-off", "each-alone", "subsets"):
        made = term_changes(base, mode, "simdistill", "t", some)  # type: ignore[arg-type]
        assert made[0] == Change("no-terms", {"detector.camera.simulated_lidar": True})
        assert {c.base for c in made[1:]} <= {"no-terms", "simdistill"} and made[1].base == "no-terms"
        trials = [t for t in expand(study(*made, base=base)) if t.change != "base"]
        assert len({str(t.config.detector) for t in trials}) == 1 and trials[0].config.distill is None
    own = replace(base, distill=DistillConfig("unidistill", "t"))
    assert term_changes(own, "subsets", "simdistill", "t", some)[0].set == {
        "detector.camera.simulated_lidar": True, "distill.method": "none"
    }  # fmt: skip


TOML = """
name = "terms"
base = ["tiny", "camera"]
seeds = [0, 1, 2]
[set]
"data.root" = "data/other"
train.epochs = 2
[changes.unidistill]
"distill.method" = "unidistill"
"distill.teacher" = "runs/teacher"
[changes.without-feature]
distill.method = "unidistill"
distill.teacher = "runs/teacher"
distill.weights.feature = 0.0
"""


def written(folder: Path, text: str) -> Path:
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


def test_toml(tmp_path: Path) -> None:
    loaded = load_study(written(tmp_path, TOML))
    assert (loaded.name, loaded.seeds, loaded.split, loaded.out) == ("terms", (0, 1, 2), "sim_val", Path("runs/terms"))
    assert loaded.base.data.root == "data/other" and loaded.base.train.epochs == 2
    assert loaded.changes == (Change("unidistill", KD), Change("without-feature", {**KD, "distill.weights.feature": 0}))
    assert load_study(tmp_path / "study.toml", tmp_path / "x").out == tmp_path / "x"
    shorthand = '[terms]\nmode = "each-off"\nmethod = "unidistill"\nteacher = "t"\nterms = ["feature"]\n'
    kept = load_study(written(tmp_path, TOML.partition("[changes")[0] + shorthand))
    assert [c.name for c in kept.changes] == ["unidistill", "without-feature"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds", "sedes", "study: unknown key 'sedes'; known keys: name, seeds"),
        ("[0, 1, 2]", "[]", "seeds: a study wants at least one"),
        ("[0, 1, 2]", "[0, 0]", "seeds: 0 is there twice"),
        ("[0, 1, 2]", '["a"]', "study.seeds: expected int, got 'a'"),
        ('name = "terms"', "", "name: a study wants one"),
        ('"camera"', '"radar"', "base: .*is not a preset .tiny, small.* and a modality"),
        ('["tiny", "camera"]', "3", "base: expected .preset, modality., a run folder or a config.json, got 3"),
        ('["tiny", "camera"]', '"nowhere"', "nowhere: no such run folder"),
        ("train.epochs = 2", "train.epochs = 2.5", "set: RunConfig.train.epochs: expected int, got 2.5"),
        (
            "train.epochs = 2",
            "train.seed = 2",
            "set: train.seed cannot be set for all runs; they are the study's seeds",
        ),
        ("train.epochs = 2", "simulation.fog = 1.0", "make that world with `kdlab simulate`"),
        ("without-feature", "unidistill", "Cannot declare"),
        ("distill.weights.feature", "distill.weights.fetaure", "changes.without-feature: .*unknown term 'fetaure'"),
        ("[changes.unidistill]", "[changes]\nx = 1\n[changes.unidistill]", "changes.x: expected a table"),
        ("[set]", '[terms]\nmode = "all"\n[set]', "study.terms.mode: 'all' is not one of"),
        ("[set]", '[terms]\nmethod = "unidistill"\nteacher = "t"\n[set]', "changes: 'unidistill' is there twice"),
    ],
)
def test_toml_that_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = written(tmp_path, TOML.replace(old, new, 1))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_study(path)
    assert str(error.value).startswith(f"{path}: ")


def test_missing_studies(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such study"):
        load_study(tmp_path / "none.toml")
    with pytest.raises(FileNotFoundError, match=r"no study's folder, it has no study\.json"):
        load_study(tmp_path)


def test_the_base_may_be_a_run_or_a_config(tmp_path: Path) -> None:
    base = mini_config(tmp_path / "set", "camera")
    save_config(replace(base, train=replace(base.train, seed=5)), tmp_path / "config.json")
    assert load_config(RunConfig, tmp_path / "config.json").train.seed == 5
    for given in (tmp_path, tmp_path / "config.json"):
        text = f'name = "x"\nbase = "{given}"\nseeds = [3]\n'
        loaded = load_study(written(tmp_path, text))
        assert loaded.base == base and loaded.split == "tiny_val"
        assert [t.seed for t in expand(loaded)] == [3]


def simulated(root: Path, **values: Any) -> SimulationConfig:
    """What the planning reads of a simulated data set."""
    world = SimulationConfig(**values)
    (root / "v1.0-sim").mkdir(parents=True)
    for name in ("scene.json", "sample.json"):
        (root / "v1.0-sim" / name).write_text("[]")
    record = {"digest": world.digest(), "complete": True, "config": asdict(world)}
    (root / "v1.0-sim" / "simulation.json").write_text(json.dumps(record))
    return world


def test_knobs_of_the_world(tmp_path: Path) -> None:
    world = simulated(tmp_path / "sim", scenes=5)
    base = tiny("camera", str(tmp_path / "sim"))
    changes = (Change("fog", {"simulation.fog": 1}), Change("clear", {"simulation.fog": 0.0}))
    one, two = (expand(study(*changes, base=base, out=tmp_path / name, seeds=(0,))) for name in ("one", "two"))
    foggy = replace(world, fog=1.0)
    assert [t.world for t in one] == [None, foggy, None]
    assert one[1].config.data.root == str(tmp_path / "one" / "worlds" / foggy.digest())
    assert one[2].folder == one[0].folder and one[2].config == base
    assert one[1].folder.name == two[1].folder.name  # where the study lies does not matter
    for values, message in (
        ({"simulation.smog": 1.0}, "simulation: unknown key 'smog'"),
        ({"simulation.fog": "thick"}, "simulation.fog: expected float"),
        ({"simulation.fog": 3.0}, "fog must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            config(values, base)
    record = tmp_path / "sim" / "v1.0-sim" / "simulation.json"
    known = json.loads(record.read_text())
    settings = SimulationConfig(**known["config"])
    record.write_text(json.dumps(known | {"digest": settings.digest()}))
    assert world_ready(tmp_path / "sim", settings)
    record.write_text(json.dumps(known | {"digest": settings.digest(), "scenes": ["scene-0001"]}))
    assert not world_ready(tmp_path / "sim", settings)  # a part of it is not the world
    record.unlink()
    with pytest.raises(ValueError, match="is not a simulated data set"):
        config({"simulation.fog": 1.0}, base)


def test_the_study_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "README.md").read_text()
    block = page.partition("`terms.toml`, complete:\n\n")[2].partition("\n\nDifferences")[0]
    monkeypatch.chdir(tmp_path)
    simulated(tmp_path / "data" / "sim")
    loaded = load_study(written(tmp_path, "\n".join(line[4:] for line in block.splitlines())))
    assert {c.name: c.base for c in loaded.changes} == {
        **dict.fromkeys(("unidistill", "released", "fog"), "base"),
        **{f"without-{term}": "unidistill" for term in TERMS},
        "fog-unidistill": "fog",
    }
    roots = {t.change: t.config.data.root for t in expand(loaded)}
    assert roots["fog"] == roots["fog-unidistill"] != roots["base"] and loaded.base.train.gradients_every == 50
