"""Where the seconds of a command go; by hand, minutes.

    PYTHONPATH=CHECKOUT OMP_NUM_THREADS=1 python -P tests/campaigns/phases.py [--clock cpu]
        [compare demo seeds=[0] ...]

Runs `alignlab` with these arguments (default: `compare demo seeds=[0]`) in this process, and prints
a table of phases: seconds inside the passes of the Wan transformer (forward and backward), seconds
outside of them, and how many samples passed through it. A second counts once, for the innermost
phase; imports count as imports wherever they happen. Of a backward pass that of the losses and
projectors, which comes before the transformer's, is outside. Runs go to a temporary folder unless
`output=` is among the arguments. `--clock cpu` counts seconds of CPU time, which other work on the
machine changes less.
"""

import argparse
import functools
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Modules as they are imported: what in them begins a phase. Whole ones hide what is inside them.
PHASES: dict[str, dict[str, str]] = {
    "alignlab.experiments.compare.config": {"load_compare": "recipe"},
    "alignlab.experiments.compare.run": {
        "prepare": "folders of the runs, inputs",
        "collect": "report",
        "write_outputs": "report",
    },
    "alignlab.experiments.report.text": {"print_summary": "report"},
    "alignlab.experiments.compare.cost": {"cost_of": "cost of a step"},
    "alignlab.experiments.compare.tracking": {
        "ParentRun.begin": "tracking",
        "ParentRun.end": "tracking",
    },
    "alignlab.tracking.tracker": {
        "ask": "tracking",
        "Tracker.__init__": "tracking",
        "Tracker.__enter__": "tracking",
        "Tracker.log": "tracking",
        "Tracker.__exit__": "tracking",
    },
    "alignlab.environment": {"describe_environment": "environment, code"},
    "alignlab.runs.code_record": {"record_code": "environment, code"},
    "alignlab.runs.open_folder": {"open_folder": "folders of the runs, inputs"},
    "alignlab.runs.run_folder": {"RunFolder.write_result": "checkpoints, results"},
    "alignlab.runs.kept_checkpoints": {"drop_checkpoints": "checkpoints, results"},
    "alignlab.training.save_checkpoint": {"CheckpointWriter.save": "checkpoints, results"},
    "alignlab.training.setup": {
        "build_run": "setup of a run",
        "check_teachers_and_eval": "setup of a run",
    },
    "alignlab.models.model_files": {"load_pretrained": "model loads"},
    "alignlab.models.weight_check": {"check_weights": "model loads"},
    "alignlab.data.shapes.dataset": {
        "ShapesDataset.__getitem__": "clips drawn",
        "ShapesDataset.references": "clips drawn",
        "ShapesDataset.caption": "clips drawn",
        "ShapesDataset.names": "clips drawn",
    },
    "alignlab.models.frozen_parts": {
        "FrozenParts.encode_video": "encoding",
        "FrozenParts.encode_text": "encoding",
        "FrozenParts.decode": "decoding",
    },
    "alignlab.models.text_encoder": {"TextEncoder.encode": "encoding"},
    "alignlab.teachers.teacher": {"Teacher.encode": "teachers' features"},
    "alignlab.dataset_cache.store": {
        "DatasetCache.read": "dataset cache",
        "DatasetCache.write": "dataset cache",
        "DatasetCache.flush": "dataset cache",
    },
    "alignlab.training.batches": {"training_batch": "training: batches"},
    "alignlab.training.alignment": {"Alignment.losses": "training: objectives"},
    "alignlab.training.optim": {
        "clip_gradients": "training: optimizer",
        "step_unless": "training: optimizer",
        "update_ema": "training: optimizer",
    },
    "alignlab.train": {
        "Trainer.train_steps": "training: all else",
        "RunTrainer.forward": "training: forward",
    },
    "alignlab.evaluation.evaluate": {
        "flow_of_first_clips": "first clips, before and after",
        "validation_flow": "validation",
        "block_metrics": "probe",
    },
    "alignlab.evaluation.collectors": {
        "ReferenceCollector.add": "probe: token metrics",
        "ReferenceCollector.metrics": "probe: token metrics",
        "VideoCollector.add": "probe: token metrics",
        "VideoCollector.metrics": "probe: token metrics",
        "GenerationCollector.add": "generated clips: metrics",
        "GenerationCollector.metrics": "generated clips: metrics",
    },
    "alignlab.evaluation.generation": {
        "generate": "generated clips: all else",
        "generated_clip": "generated clips: sampling",
        "real_clip_metrics": "real clips: metrics",
        "_write_sample": "generated clips: files",
    },
}
WHOLE = {"report", "cost of a step", "real clips: metrics", "first clips, before and after"}
IMPORTS = "imports"
BACKWARD = "training: backward"
TRANSFORMER = "diffusers.models.transformers.transformer_wan"


class Phases:
    """Seconds by phase, inside and outside the transformer's passes.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds: dict[tuple[str, bool], float] = defaultdict(float)
        self.samples: dict[str, int] = defaultdict(int)
        self._clock = clock
        self._thread = threading.get_ident()
        self._stack: list[tuple[str, bool]] = [("all else", False)]
        self._last = clock()

    @property
    def current(self) -> str:
        """The innermost phase."""
        return self._stack[-1][0]

    def charge(self) -> None:
        """Gives the seconds since the last change to the innermost phase."""
        now = self._clock()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now

    def switch_to_transformer(self) -> None:
        """The innermost phase goes on inside the transformer, until it ends."""
        self.charge()
        self._stack[-1] = (self.current, True)

    @contextmanager
    def within(self, phase: str | None, *, transformer: bool = False) -> Iterator[None]:
        """Counts for a phase, or None for the innermost one, what happens in here."""
        if threading.get_ident() != self._thread:
            yield
            return
        is_hidden = phase != IMPORTS and any(name in WHOLE for name, _ in self._stack)
        self.charge()
        self._stack.append((self.current if phase is None or is_hidden else phase, transformer))
        depth = len(self._stack)
        try:
            yield
        finally:
            self.charge()
            del self._stack[depth - 1 :]

    def wrapped(self, function: Any, phase: str) -> Any:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.within(phase):
                return function(*args, **kwargs)

        return counted

    def print(self) -> None:
        self.charge()
        total = sum(self.seconds.values())
        inside = sum(s for (_, is_inside), s in self.seconds.items() if is_inside)
        print("| phase | samples | s in the transformer | s outside | share of all |")
        print("|---|---:|---:|---:|---:|")
        names = {name for name, _ in self.seconds}
        by_cost = {n: self.seconds[n, True] + self.seconds[n, False] for n in names}
        for name in sorted(by_cost, key=lambda n: -by_cost[n]):
            samples, share = self.samples.get(name, 0), by_cost[name] / total
            print(
                f"| {name} | {samples or ''} | {self.seconds[name, True]:.1f} "
                f"| {self.seconds[name, False]:.1f} | {share:.1%} |"
            )
        count = sum(self.samples.values())
        print(f"| all | {count} | {inside:.1f} | {total - inside:.1f} | 100 % |")
        print(f"outside the transformer's passes: {1 - inside / total:.1%} of {total:.1f} s")


def install(phases: Phases) -> None:
    """Wraps what `PHASES` names when its module is imported, and counts imports."""
    bootstrap: Any = sys.modules["_frozen_importlib"]
    find_and_load = bootstrap._find_and_load
    done = set[str]()

    def counted(name: str, importer: Any) -> Any:
        with phases.within(IMPORTS):
            module = find_and_load(name, importer)
        if name in PHASES and name not in done:
            done.add(name)
            for path, phase in PHASES[name].items():
                *owners, attribute = path.split(".")
                owner = functools.reduce(getattr, owners, module)
                setattr(owner, attribute, phases.wrapped(getattr(owner, attribute), phase))
        if name == TRANSFORMER and name not in done:
            done.add(name)
            watch_transformer(phases, module.WanTransformer3DModel)
        return module

    bootstrap._find_and_load = counted


def watch_transformer(phases: Phases, model_class: Any) -> None:
    """Counts its passes; a backward pass becomes the transformer's at its last node."""
    import torch

    forward, backward = model_class.forward, torch.autograd.backward
    is_losses = False

    def reached(_: Any) -> None:
        nonlocal is_losses
        if is_losses:
            is_losses = False
            phases.switch_to_transformer()

    @functools.wraps(forward)
    def counted_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with phases.within(None, transformer=True):
            out = forward(self, *args, **kwargs)
            phases.samples[phases.current] += len(out[0])
        if out[0].grad_fn is not None:
            out[0].grad_fn.register_prehook(reached)
        return out

    def counted_backward(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_losses
        is_losses = True
        with phases.within(BACKWARD):
            backward(*args, **kwargs)

    model_class.forward = counted_forward
    torch.autograd.backward = counted_backward


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("arguments", nargs="*", default=["compare", "demo", "seeds=[0]"])
    given = parser.parse_args()
    phases = Phases(time.perf_counter if given.clock == "wall" else time.process_time)
    install(phases)
    with tempfile.TemporaryDirectory() as folder:
        arguments = list(given.arguments)
        if not any(argument.startswith("output=") for argument in arguments):
            arguments.append(f"output={folder}")
        sys.argv = ["alignlab", *arguments]
        try:
            from alignlab.__main__ import main as command

            command()
        except SystemExit as ended:
            if ended.code:
                raise
        phases.print()


if __name__ == "__main__":
    main()
