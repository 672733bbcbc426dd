"""The commands that `alignlab repro` prints make the run again, to the bit."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignlab import checkout
from alignlab.errors import UserError
from alignlab.recipe import load_run
from alignlab.repro import repro_commands
from alignlab.runs import code_record
from alignlab.runs.checksums import write_json
from alignlab.runs.code_record import read_code, record_code
from alignlab.runs.input_record import InputRecord
from alignlab.runs.inputs import read_inputs
from alignlab.runs.run_folder import RunFolder
from alignlab.runs.verify import verify_run
from alignlab.train import train
from command_line import alignlab, refused
from run_contents import timeless_metrics
from tiny_runs import MakeConfig

SMALL = ("eval.clips=1", "checkpoint.every=1", "optim.batch_size=1")


def carried_out(lines: Sequence[str]) -> int:
    """Runs the trainings among the commands in this process; gives how many they are."""
    count = 0
    for line in lines:
        words = shlex.split(line, comments=True)  # what comes before `train` is set here
        if "train" in words:
            result = alignlab(*words[words.index("train") :])
            assert result.exit_code == 0, result.output
            count += 1
    return count


def weights(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step-{step:06d}"
    return {
        name: value.numpy().tobytes()
        for file in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def test_a_prolonged_run_that_started_from_another_is_made_again(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """The other run first, then both legs."""
    source = train(make_config("name=source", "steps=1", *SMALL))
    settings = ("name=stage2", *SMALL, f"model.init_from={source}", "optim.schedule=linear")
    train(make_config("steps=1", *settings))
    run = train(make_config("steps=2", *settings, "optim.resume_schedule=stretch"))
    result = alignlab("repro", run, "--output", tmp_path / "again")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    trainings = [line for line in lines if " train " in line]
    steps = [word for line in trainings for word in line.split() if word.startswith("steps=")]
    assert steps == ["steps=1", "steps=1", "steps=2"]
    assert f"OMP_NUM_THREADS={torch.get_num_threads()} " in trainings[0]
    assert f"model.init_from={tmp_path / 'again' / 'source'}" in trainings[1]
    assert "optim.resume_schedule=stretch" in trainings[2]
    assert carried_out(lines) == 3
    again = tmp_path / "again" / "stage2"
    assert weights(again, 2) == weights(run, 2)
    assert timeless_metrics(again) == timeless_metrics(run)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    assert "no run there" in refused("repro", tmp_path)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout with one file, which this process takes for alignlab's."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "a.py").write_text("one = 1\n")
    me = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    awkward = {"diff.noprefix": "true", "color.ui": "always", "diff.external": "false"}
    settings = [("config", name, value) for name, value in awkward.items()]
    for words in (("init", "-q"), *settings, ("add", "a.py"), (*me, "commit", "-qm", "first")):
        subprocess.run(["git", *words], cwd=folder, check=True)
    monkeypatch.setattr(checkout, "FOLDER", folder)
    forget()
    yield folder
    forget()


def forget() -> None:
    code_record._diff.cache_clear()
    code_record._facts.cache_clear()


def test_commit_and_changes_are_kept(
    repository: Path, full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What git knows of, and no content of anything else."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", "environment.json"):
        (run / name).write_text((full_run / name).read_text())
    (repository / "a.py").write_text("one = 2\n")
    (repository / "secret.env").write_text("TOKEN=xyz\n")
    record_code(run, step=0)
    (start,) = read_code(run)
    changed = (run / "code.diff").read_text()
    assert "+one = 2" in changed and start["untracked"] == ["secret.env"]
    assert not any("xyz" in path.read_text() for path in run.iterdir())
    lines = repro_commands(run)
    commit = start["commit"]
    git = f"git -C {repository}"  # wherever the trainings are
    assert f"{git} checkout {commit}" in lines and f"{git} apply {run / 'code.diff'}" in lines
    assert "# git did not know: secret.env" in lines
    # a clean clone with the diff is the code again
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", repository, clone], check=True)
    subprocess.run(["git", "apply", run / "code.diff"], cwd=clone, check=True)
    assert (clone / "a.py").read_text() == "one = 2\n"
    # the same code again: nothing is added; other code: it is
    record_code(run, step=1)
    assert len(read_code(run)) == 1
    (repository / "a.py").write_text("one = 3\n")
    forget()
    record_code(run, step=1)
    assert [s["diff"] for s in read_code(run)] == ["code.diff", "code-2.diff"]
    (run / "code-2.diff").write_text("")
    with pytest.raises(UserError, match=r"code-2\.diff is damaged \(it is empty\)"):
        repro_commands(run)
    assert any("code-2.diff is damaged" in line for line in verify_run(run).damaged.values())
    # larger than is kept: that is said
    monkeypatch.setattr(code_record, "MOST_BYTES", 10)
    record_code(run, step=0)
    assert read_code(run)[0]["diff"] is None
    assert any("more than the" in line for line in repro_commands(run))


def test_each_code_is_put_on_a_checkout_without_the_one_before(
    repository: Path, full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands for git of a prolonged run, carried out on a clone."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", "environment.json"):
        (run / name).write_text((full_run / name).read_text())
    for step, text in enumerate(("one = 2\n", "one = 3\n", "one = 3\n")):
        (repository / "a.py").write_text(text)
        forget()
        record_code(run, step=step)
    write_json(run / "history.json", {"legs": [{"steps": 1}, {"steps": 2, "from_step": 1}]})
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", repository, clone], check=True)
    monkeypatch.setattr(checkout, "FOLDER", clone)
    found = []
    for line in repro_commands(run):
        if line.startswith("git "):
            subprocess.run(shlex.split(line), cwd=tmp_path, check=True, capture_output=True)
        elif " train " in line:
            found.append((clone / "a.py").read_text())
    assert found == ["one = 2\n", "one = 3\n"]


def test_an_installed_package_says_its_version(
    full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkout, "FOLDER", tmp_path)
    forget()
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", "environment.json"):
        (run / name).write_text((full_run / name).read_text())
    record_code(run, step=0)
    forget()
    assert not (run / "code.diff").exists()
    assert any(line.startswith("pip install alignlab==") for line in repro_commands(run))
    assert load_run(run / "recipe.yaml", stored=True).steps == 2


def made_again(lines: Sequence[str]) -> list[list[str]]:
    """The settings of each training among the commands."""
    words = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in line if "=" in word] for line in words if "train" in line]


@pytest.fixture
def two_runs(full_run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """`dst`, which started from `src` after two steps; that one was prolonged to five since."""
    recipe = load_run(full_run / "recipe.yaml", stored=True)
    folders = [RunFolder(tmp_path / name) for name in ("src", "dst")]
    for folder in folders:
        folder.path.mkdir()
        shutil.copy(full_run / "environment.json", folder.path)
        config = recipe.model_copy(update={"name": folder.path.name, "output": str(tmp_path)})
        if folder.path.name == "dst":
            model = config.model.model_copy(update={"init_from": str(tmp_path / "src")})
            config = config.model_copy(update={"model": model})
        folder.write_recipe(config)
    src, dst = folders
    shutil.copytree(full_run / "checkpoints", src.checkpoints)
    shutil.copy(full_run / "result.json", src.path)
    record_inputs(dst)
    src.write_recipe(src.config().model_copy(update={"steps": 5}))
    write_json(src.path / "history.json", {"legs": [{"steps": 2}, {"steps": 5, "from_step": 2}]})
    later = src.checkpoints / "step-000005"
    shutil.copytree(src.checkpoints / "step-000002", later)
    (later / "objectives.safetensors").write_text("trained further")
    return src.path, dst.path


def record_inputs(run: RunFolder) -> None:
    config = run.config()
    InputRecord(run.path, config.output).keep(read_inputs(config, fetch=False), fixed=False)


def test_a_source_is_made_as_far_as_the_run_started_from_it(two_runs: tuple[Path, Path]) -> None:
    src, dst = two_runs
    first, second = made_again(repro_commands(dst))
    assert "steps=2" in first and "model.init_from=repro/src" in second
    # of an older record, which names no checkpoint: it is found by what it holds
    record = json.loads((dst / "inputs.json").read_text())
    for entry in record["inputs"]:
        entry.pop("checkpoint", None)
    write_json(dst / "inputs.json", {k: v for k, v in record.items() if k != "checksum"})
    assert len(made_again(repro_commands(dst))) == 2
    shutil.rmtree(src / "checkpoints" / "step-000002")
    lines = repro_commands(dst)
    assert f"# after which of its parts it started from {src} is not known" in lines
    assert len(made_again(lines)) == 3


def test_other_weights_than_it_started_from_are_told(two_runs: tuple[Path, Path]) -> None:
    src, dst = two_runs
    (src / "checkpoints" / "step-000002" / "objectives.safetensors").write_text("other")
    assert any("holds other weights than it started from" in x for x in repro_commands(dst))


def test_a_checkpoint_that_is_named_is_kept_until_it_is_read(two_runs: tuple[Path, Path]) -> None:
    src, dst = (RunFolder(path) for path in two_runs)
    (dst.path / "inputs.json").unlink()
    named = dst.config().model.model_copy(
        update={"init_from": f"{src.path}/checkpoints/step-000003"}
    )
    dst.write_recipe(dst.config().model_copy(update={"model": named}))
    kept = src.config().checkpoint.model_copy(update={"keep_every": 1000})
    src.write_recipe(src.config().model_copy(update={"checkpoint": kept}))
    *_, first, second = made_again(repro_commands(dst.path))
    assert {"steps=5", "checkpoint.every=3", "checkpoint.keep=2"} <= {*first}
    assert "checkpoint.keep_every=null" in first  # else no multiple of every
    assert "model.init_from=repro/src/checkpoints/step-000003" in second


@pytest.mark.parametrize(("every", "said"), [(2, "checkpoint.weights_every=3"), (3, None)])
def test_a_copy_of_weights_that_is_named_is_written_again(
    two_runs: tuple[Path, Path], every: int, said: str | None
) -> None:
    """With the run's own setting where that writes it."""
    src, dst = (RunFolder(path) for path in two_runs)
    (dst.path / "inputs.json").unlink()
    copy = f"{src.path}/checkpoints/weights-000003"
    named = dst.config().model.model_copy(update={"init_from": copy})
    dst.write_recipe(dst.config().model_copy(update={"model": named}))
    kept = src.config().checkpoint.model_copy(update={"weights_every": every})
    src.write_recipe(src.config().model_copy(update={"checkpoint": kept}))
    *_, first, second = made_again(repro_commands(dst.path))
    assert "steps=5" in first and "model.init_from=repro/src/checkpoints/weights-000003" in second
    assert [word for word in first if word.startswith("checkpoint.")] == ([said] if said else [])


def test_paths_that_depend_on_the_folder_are_named(full_run: Path, tmp_path: Path) -> None:
    for name in ("recipe.yaml", "environment.json"):
        shutil.copy(full_run / name, tmp_path)
    run = RunFolder(tmp_path)
    assert not any("to be trained in" in line for line in repro_commands(tmp_path))
    model = run.config().model.model_copy(update={"path": "models/my/wan"})
    run.write_recipe(run.config().model_copy(update={"model": model}))
    assert repro_commands(tmp_path)[1] == (
        "# to be trained in the folder where it was, from which it reads model.path (models/my/wan)"
    )
