"""`alignlab data masks --backend opencv`: how good its masks are, and that kills change none.

    PYTHONPATH=.:tests/helpers OMP_NUM_THREADS=1 python -P tests/campaigns/masks.py iou
        [--clips 40] [--seed 1]
    PYTHONPATH=. python -P tests/campaigns/masks.py phrases
    PYTHONPATH=.:tests/helpers OMP_NUM_THREADS=1 python -P tests/campaigns/masks.py kill
        [--on shapes|DATA] [--clips 40] [--kills 10] [--seed 1]

iou      `shapes` exported as a folder data set, 9 frames of 64x64 and 33 of 128x128, entities boxed
         in the first frame alone: intersection over union with the true masks of the LAST frame,
         beside that of the box, moved by the median optical flow in it; then by confidence
phrases  what the rule for noun phrases finds in the committed captions: those of the 22 real clips
         against the phrases of their references, and of 200 captions of `shapes`
kill     the command on exported `shapes`, or on DATA, what `alignlab data real-clips` wrote, is
         killed with SIGKILL at random moments and given again. After every kill, what has its final
         name has to be as the uninterrupted command left it; in the end there have to be the same
         files with the same bytes. It works on a copy of DATA

Exits 1 if the masks are not at least 0.1 better than the boxes, or a kill left anything else.
"""

import argparse
import importlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from forked_command import ForkedCommand


def iou(clips: int, seed: int) -> bool:
    from alignlab.config.data import ShapesConfig
    from alignlab.data.images import read_labels
    from alignlab.data.video import decode_clip
    from alignlab.masks.files import read_record
    from alignlab.masks.make import MaskSettings, make_masks
    from alignlab.masks.opencv import OpenCV
    from exported_shapes import carried_box, export_shapes, overlap

    is_well = True
    for frames, side in ((9, 64), (33, 128)):
        root = Path(tempfile.mkdtemp())
        shapes = ShapesConfig(frames=frames, size=(side, side), seed=seed)
        config, truths = export_shapes(root, shapes, clips)
        # no entity is in doubt: all labels are written
        made = make_masks(config, OpenCV(), MaskSettings(min_confidence=0.0))
        table = []
        rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
        for clip, row, truth_ETHW in zip(made.clips, rows, truths, strict=True):
            assert clip.folder is not None
            record = read_record(clip.folder)
            assert record is not None
            video = decode_clip(
                root / row["file_name"], frames=frames, fps=shapes.fps, size_HW=(side, side)
            ).video_THWC
            first, last = (read_labels(clip.folder / f"{n:05d}.png") for n in (0, frames - 1))
            for number, truth_THW in enumerate(truth_ETHW):
                table.append(
                    (
                        overlap(first == number + 1, truth_THW[0]),
                        overlap(last == number + 1, truth_THW[-1]),
                        overlap(carried_box(video, row["boxes"][number]), truth_THW[-1]),
                        record.confidence[number][-1],
                    )
                )
        first, last, box, sure = np.array(table).T
        gain = last - box
        error = gain.std(ddof=1) / len(gain) ** 0.5
        print(
            f"{frames} frames of {side}x{side}, seed {seed}: {len(table)} entities, {clips} clips; "
            f"first frame {first.mean():.3f}, last frame {last.mean():.3f}, box {box.mean():.3f}, "
            f"better by {gain.mean():.3f} (standard error {error:.3f})"
        )
        for low, high in ((0, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.01)):
            here = (sure >= low) & (sure < high)
            if here.any():
                print(
                    f"  confidence {low:.1f} to {min(high, 1):.1f}: {here.sum():3d} entities, IoU "
                    f"{last[here].mean():.3f}, lowest {last[here].min():.3f}"
                )
        is_well &= bool(gain.mean() >= 0.1)
        shutil.rmtree(root)
    return is_well


def phrases() -> bool:
    from alignlab.config.data import ShapesConfig
    from alignlab.data.real_clips.manifest import CUTS, OUTLINES
    from alignlab.data.shapes.dataset import ShapesDataset
    from alignlab.masks.phrases import noun_phrases

    def bare(phrase: str) -> str:
        return phrase.removeprefix("the ").removeprefix("an ").removeprefix("a ")

    exact = inside = wanted = found = 0
    for name, cut in CUTS.items():
        given = noun_phrases(cut.caption)
        found += len(given)
        named = {bare(OUTLINES[subject].phrase) for subject in cut.subjects}
        wanted += len(named)
        exact += len(named & set(given))
        inside += sum(any(p in phrase for p in given) for phrase in named)
        print(f"{name}: {', '.join(given)}   (references: {', '.join(sorted(named))})")
    print(
        f"real clips: of {wanted} phrases of references {exact} found word for word, {inside} at "
        f"least in part; {found} phrases in all"
    )
    dataset = ShapesDataset(ShapesConfig(train_clips=200), "train")
    pairs = [(set(noun_phrases(dataset.caption(n))), set(dataset.entities(n))) for n in range(200)]
    hits = sum(len(given & true) for given, true in pairs)
    print(
        f"shapes: {hits} of {sum(len(true) for _, true in pairs)} entities found, "
        f"{sum(len(given - true) for given, true in pairs)} phrases that are none"
    )
    return True


class KilledCommand:
    """The command on a folder of clips, killed and given again.

    Args:
        on: `shapes`, or a folder that `alignlab data real-clips` wrote, which is copied.
        clips: of `shapes`.
        seed: of `shapes` and of the moments.
    """

    def __init__(self, on: str, clips: int, seed: int) -> None:
        from alignlab.config.data import ShapesConfig
        from exported_shapes import export_shapes
        from run_contents import file_contents

        for module in ("alignlab.cli", "alignlab.experiments.masks_page", "alignlab.masks.opencv"):
            importlib.import_module(module)  # a fork then begins at once
        self.contents, self.draw = file_contents, random.Random(seed)
        self.root = Path(tempfile.mkdtemp()) / "data"
        self.errors = self.root.parent / "errors"
        self.given = ["data", "masks", "real_clips", f"data.path={self.root}", "--name", "made"]
        if on == "shapes":
            export_shapes(self.root, ShapesConfig(frames=9, size=(64, 64), seed=seed), clips)
            self.given += ["data.frames=9", "data.size=[64,64]", "data.fps=8"]
        else:
            shutil.copytree(on, self.root)
            self.given += ["--prompts", str(self.root / "prompts.json")]
        self.before = file_contents(self.root)
        self.faults: list[str] = []

    def start(self) -> "ForkedCommand":
        from forked_command import ForkedCommand

        command = ForkedCommand(self.given, self.errors)
        command.start()
        return command

    def whole(self) -> float:
        """Gives the command and lets it end; its seconds."""
        command = self.start()
        ended = command.wait(3600)
        if ended != 0:
            sys.exit(f"ended with {ended}: {self.errors.read_text()[-500:]}")
        return time.monotonic() - command.begun

    def made(self) -> dict[str, bytes]:
        """All that the command has written, by name."""
        found = self.contents(self.root)
        changed = [name for name in self.before if found.get(name) != self.before[name]]
        self.faults += [f"{name}, which was there, is another" for name in changed]
        return {name: content for name, content in found.items() if name not in self.before}

    def remove(self) -> None:
        shutil.rmtree(self.root / "made")
        (self.root / "metadata-made.jsonl").unlink(missing_ok=True)

    def kill(self, moment: float) -> bool:
        """Kills the command at a moment; False if it has ended before."""
        command = self.start()
        if command.wait(moment) is not None:
            return False
        command.send(signal.SIGKILL)
        return command.wait(60) == -signal.SIGKILL


def is_temporary(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def kill(on: str, clips: int, kills: int, seed: int) -> bool:
    trial = KilledCommand(on, clips, seed)
    seconds = trial.whole()
    expected = trial.made()
    trial.remove()
    moments: list[float] = []
    starts = most = 0
    while len(moments) < kills:
        starts += 1
        moment = trial.draw.uniform(0, 1.8 * seconds / kills)
        is_killed, found = trial.kill(moment), trial.made()
        if is_killed:
            moments.append(round(moment, 2))
            most = max(most, sum(map(is_temporary, found)))
            found = {name: held for name, held in found.items() if not is_temporary(name)}
            trial.faults += [f"{n} differs" for n, held in found.items() if expected.get(n) != held]
        else:  # it was at its end: once more from nothing
            trial.faults += [] if found == expected else ["it ended with another folder"]
            trial.remove()
    last, found = trial.whole(), trial.made()
    differing = [n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)]
    trial.faults += [f"{name} differs in the end" for name in sorted(differing)]
    trial.faults += ["a traceback was printed"] if "Traceback" in trial.errors.read_text() else []
    print(
        f"{on}: {len(expected)} files in {seconds:.1f} s; {kills} kills in {starts} starts at "
        f"{', '.join(map(str, moments))} s after the start, at most {most} temporary files left by "
        f"one; then {last:.1f} s to the end; {len(trial.faults)} differences"
    )
    for fault in trial.faults[:20]:
        print(f"  {fault}")
    shutil.rmtree(trial.root.parent)
    return not trial.faults


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=["iou", "phrases", "kill"])
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--on", default="shapes")
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args()
    if options.part == "phrases":
        is_well = phrases()
    elif options.part == "kill":
        is_well = kill(options.on, options.clips, options.kills, options.seed)
    else:
        is_well = iou(options.clips, options.seed)
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
