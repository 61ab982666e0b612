"""`kdlab plan`."""

# No `from __future__ import annotations`: tyro reads the annotations of classes that are defined inside functions.
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from kdlab.commands.parse import parse

if TYPE_CHECKING:
    from kdlab.config import RunConfig


def plan(args: Sequence[str]) -> int:
    """Print a preset's settings with their sources, and the memory and FLOPs of its training step.

    `kdlab train paper-...` prints the same before the first step of a new run; other trainings print no plan.
    """
    from kdlab.distill import usual_teacher
    from kdlab.pairing import check_pair, distillation, fit_student
    from kdlab.presets import PRESETS

    choices = tyro.extras.literal_type_from_choices(list(PRESETS))

    @dataclass
    class Plan:
        preset: Annotated[choices, tyro.conf.Positional]  # type: ignore[valid-type]
        """Whose training."""
        modality: Annotated[Literal["lidar", "camera", "fusion"], tyro.conf.Positional]
        """Sensors of the trained detector."""
        method: str = ""
        """Distil by this method, or by several: unidistill+labeldistill; none where left out."""
        variant: Literal["intended", "released"] = "intended"
        """All quirks of the released code off or on."""
        quirks: tuple[str, ...] = ()
        """Quirks to flip from the variant's setting."""
        options: dict[str, str] = field(default_factory=dict)
        """How the method is built (see `kdlab methods NAME`)."""
        teacher_modality: Literal["lidar", "camera", "fusion"] | None = None
        """Sensors of the teacher, of the same preset; the method's usual one where left out."""
        batch: int = 0
        """Samples of a step on one device; 0: the preset's batch, all on one device."""

    given = parse(Plan, "plan", args, str(plan.__doc__))
    config: RunConfig = PRESETS[given.preset](given.modality)
    teacher = None
    if given.method:
        own = {name: getattr(given, name) for name in ("variant", "quirks", "options")}
        distill = replace(distillation(given.preset, given.method, ""), **own)
        config, said = fit_student(replace(config, distill=distill))
        teacher = PRESETS[given.preset](given.teacher_modality or usual_teacher(given.method, given.modality))
        check_pair(config, teacher)
        if said:
            print(f"student: {'; '.join(said)}")
    elif given.teacher_modality or given.variant != "intended" or given.quirks or given.options:
        raise ValueError(
            "--teacher-modality, --variant, --quirks and --options want a distillation: name its --method "
            "(see `kdlab methods`)"
        )
    print(plan_text(given.preset, config, teacher, given.batch))
    return 0


def plan_text(preset: str, config: "RunConfig", teacher: "RunConfig | None", batch: int = 0) -> str:
    """Settings with their sources and deviations, where the preset is a paper's, and the plan of a step.

    Args:
        preset: a name in `kdlab.presets.PRESETS`.
        config: of the run, the preset's or one made from it.
        teacher: config of its teacher's run, where it distils.
        batch: samples of a step on one device; 0: the config's.
    """
    from kdlab.plan import plan_step
    from kdlab.presets import PAPERS, PRESETS

    texts = []
    if preset in PAPERS:
        texts.append(PAPERS[preset].describe(config, PRESETS[preset](config.detector.modality)))
    texts.append(plan_step(config, teacher.detector if teacher is not None else None, batch).text())
    return "\n".join(texts)


def plan_of_run(preset: str, config: "RunConfig") -> str:
    """`plan_text` of a training that is about to start on as many processes as there are.

    Raises:
        FileNotFoundError: no teacher, or its training has not ended.
        ValueError: student, teacher and method do not fit each other.
    """
    import os

    from kdlab.checkpoint import load_run_config
    from kdlab.pairing import check_teacher

    check_teacher(config)
    teacher = load_run_config(config.distill.teacher) if config.distill is not None else None
    here = -(-config.train.batch_size // int(os.environ.get("WORLD_SIZE", "1")))
    return plan_text(preset, config, teacher, here)
