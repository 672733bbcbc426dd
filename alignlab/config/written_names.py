"""Names of what alignlab itself writes below `output`: no run may have one of them.

A run of such a name would lie where a file has to be, or in a folder that is replaced; so would
what a command writes at `--out`.
"""

import re

ERROR = "error.json"
"""In a run's folder: the error that ended its last training (`alignlab.tracking.tracker`)."""

_IN_OUTPUT = ("mlflow.db", "mlartifacts", "mlruns", "cache", "figures")  # figures: of a variant too
_KEPT = ("checkpoints", "samples", "stage1")
_EXPORTS = ("export", "export-peft", "export-comfyui", "export-musubi")
_IN_RUNS = (*_KEPT, *_EXPORTS, "probe", "evaluations", "tensorboard", "wandb", "figures")
_FILES = frozenset(
    """
    recipe.yaml inputs.json environment.json metrics.jsonl result.json history.json mlflow_run_id
    comparison.json report.html report.md table.csv table.tex steps.csv noise_floor.csv
    progress.json budget.json cost.json code.json checksums.json mlflow.json mlflow_tags.json
    wandb.json study.db trials.csv best.yaml sweep.html worker.log stage1.json compare.yaml
    """.split()
) | {ERROR}
_MORE_FILES = (
    r"(mlflow|study)\.db\b.*|budget\.json\.lock|worker-\d+\.log|result-\d+\.json|code(-\d+)?\.diff"
    r"|recipe-\d+\.yaml"
)
_OF_A_SEED = r".+/seed-\d+"  # as comparisons and sweeps name their runs


def is_kept(name: str) -> bool:
    """Whether a run, comparison, sweep or Stage 1 network reads again what has this name in it.

    Its exports, `probe`, `evaluations`, `tensorboard` and `wandb` are for users alone.
    """
    if name in _FILES or name in _KEPT or name.startswith("."):
        return True
    return re.fullmatch(_MORE_FILES, name) is not None


def refuse_written(name: str) -> None:
    """Refuses the name of a run, a variant or the like.

    Args:
        name: parts, with `/` between.

    Raises:
        ValueError: one of them is a name that alignlab writes there.
    """
    parts = name.split("/")
    for number, part in enumerate(parts):
        is_folder = part in (_IN_RUNS if number else _IN_OUTPUT)
        if part in _FILES or re.fullmatch(_MORE_FILES, part):
            raise ValueError(f"{name!r}: alignlab writes a file {part!r}: choose another name")
        if is_folder and not re.fullmatch(_OF_A_SEED, name):
            raise ValueError(f"{name!r}: alignlab writes into {part!r}: choose another name")
        if part.startswith("."):
            raise ValueError(f"{name!r}: names that begin with a dot are alignlab's own")
