"""The export is plain diffusers: it loads where alignlab cannot be imported, and is the model."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.export import export
from alignlab.models.wan import load_wan
from alignlab.runs.checkpoint_folders import latest
from alignlab.runs.run_folder import RunFolder
from alignlab.train import train
from alignlab.training import checkpoint
from alignlab.training.setup import build_run

MakeConfig = Callable[..., RunConfig]

WITHOUT_ALIGNLAB = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "alignlab":
            raise ImportError("no " + name)

sys.meta_path.insert(0, Block())
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

base, full, lora, inputs, out = sys.argv[1:]
found = {}
for name, folder, adapter in (("base", base, None), ("full", full, None), ("lora", base, lora)):
    pipeline = WanPipeline.from_pretrained(folder)
    if adapter:
        pipeline.load_lora_weights(adapter)
    with torch.no_grad():
        found[name] = pipeline.transformer(**load_file(inputs), return_dict=False)[0]
    found[name + " video"] = pipeline(
        "a red circle", height=48, width=48, num_frames=5, num_inference_steps=1,
        output_type="pt", generator=torch.Generator().manual_seed(0),
    ).frames
save_file(found, out)
try:
    import alignlab
except ImportError:
    sys.exit(0)
sys.exit("alignlab could be imported")
"""


def fixed_input() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 2, 6, 6, generator=rng),
        "timestep": torch.tensor([600.0]),
        "encoder_hidden_states": torch.randn(1, 16, 32, generator=rng),
    }


def trained(run: Path) -> WanTransformer3DModel:
    """The transformer as training would resume with it."""
    state = build_run(RunFolder.open(run).config()).state
    newest = latest(run / "checkpoints")
    assert newest is not None
    checkpoint.restore(state, newest)
    return state.transformer.eval()


@torch.no_grad()
def output(transformer: WanTransformer3DModel) -> Tensor:
    found: Tensor = transformer(**fixed_input(), return_dict=False)[0]
    return found


def tree(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def exported(
    full_run: Path, lora_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    return {
        "full": export(full_run, folder / "deep" / "full"),
        "lora": export(lora_run, folder / "lora"),
    }


@pytest.fixture(scope="module")
def outside(
    exported: dict[str, Path], wan_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """What the exports give in a process that cannot import alignlab."""
    folder = tmp_path_factory.mktemp("outside")
    save_file(fixed_input(), folder / "inputs.safetensors")
    arguments = [wan_folder, exported["full"], exported["lora"]]
    arguments += [folder / "inputs.safetensors", folder / "out.safetensors"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_ALIGNLAB, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out.safetensors")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_export_gives_the_trained_output_without_alignlab(
    kind: str, outside: dict[str, Tensor], request: pytest.FixtureRequest
) -> None:
    expected = output(trained(request.getfixturevalue(f"{kind}_run")))
    torch.testing.assert_close(outside[kind], expected, rtol=1e-5, atol=1e-6)
    # far from the base model, so that a forgotten weight or a wrong scale would show
    assert (outside[kind] - outside["base"]).abs().max() > 0.05
    video = outside[f"{kind} video"]
    assert video.shape == (1, 5, 3, 48, 48) and torch.isfinite(video).all()
    assert not torch.equal(video, outside["base video"])


def test_the_folder_is_laid_out_as_the_original(
    exported: dict[str, Path], wan_folder: Path
) -> None:
    assert tree(exported["full"]) == tree(wan_folder) | {"model_card.md"}
    weights = "transformer/diffusion_pytorch_model.safetensors"
    original, found = load_file(wan_folder / weights), load_file(exported["full"] / weights)
    assert found.keys() == original.keys()
    assert all(found[name].shape == original[name].shape for name in original)
    untouched = [name for name in tree(wan_folder) if not name.startswith("transformer/")]
    for name in set(untouched) - {"model_index.json"}:
        assert (exported["full"] / name).read_bytes() == (wan_folder / name).read_bytes()


def test_a_lora_export_is_the_adapter_alone(exported: dict[str, Path], lora_run: Path) -> None:
    assert tree(exported["lora"]) == {"pytorch_lora_weights.safetensors", "model_card.md"}
    names = load_file(exported["lora"] / "pytorch_lora_weights.safetensors").keys()
    assert all(name.startswith("transformer.blocks.") for name in names)
    adapted = [n for n, _ in trained(lora_run).named_parameters() if "lora_" in n]
    assert len(names) == len(adapted) > 0


def test_a_lora_that_diffusers_fuses_is_a_model_to_train_from(
    exported: dict[str, Path], lora_run: Path, wan_folder: Path, tmp_path: Path
) -> None:
    """As `model.init_from` advises where all weights are to go on from a LoRA."""
    pipeline = WanPipeline.from_pretrained(wan_folder)
    pipeline.load_lora_weights(exported["lora"])
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "whole")
    whole = load_wan(str(tmp_path / "whole")).transformer.eval()
    torch.testing.assert_close(output(whole), output(trained(lora_run)), rtol=1e-4, atol=1e-4)


def test_a_lora_starts_as_the_base_model(make_config: MakeConfig, wan_folder: Path) -> None:
    run = build_run(make_config("model.train=lora", "model.lora.rank=4"))
    base = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    assert torch.equal(output(run.state.transformer.eval()), output(base.eval()))


@pytest.mark.parametrize("lora", [(), ("model.train=lora", "model.lora.rank=4")])
def test_the_moving_average_is_exported(
    make_config: MakeConfig, lora: tuple[str, ...], tmp_path: Path, wan_folder: Path
) -> None:
    run = train(make_config("optim.ema=0.5", "optim.lr=0.01", *lora))
    newest = latest(run / "checkpoints")
    assert newest is not None
    average = load_file(newest / "ema.safetensors")
    last = dict(trained(run).named_parameters())
    out = export(run, tmp_path / "out")
    if lora:
        base = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
        base.load_lora_adapter(out / "pytorch_lora_weights.safetensors", adapter_name="default")
        found = {n: p for n, p in base.named_parameters() if "lora_" in n}
    else:
        found = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == average.keys()
    assert all(torch.equal(found[name], average[name]) for name in average)
    assert any(not torch.equal(found[name], last[name]) for name in average)


def test_only_an_own_export_is_written_over(full_run: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty"):
        export(full_run, foreign)
    assert tree(foreign) == {"thesis.tex"}
    with pytest.raises(UserError, match="is a file"):
        export(full_run, foreign / "thesis.tex")
    first = export(full_run, full_run / "export")
    (first / "model_index.json").unlink()  # a damaged export is replaced as a whole
    assert tree(export(full_run, full_run / "export")) == tree(first) >= {"model_index.json"}
    hidden = {p.name for p in full_run.iterdir() if p.name.startswith(".")}
    assert hidden <= {".writer", ".writer.lock"}


def test_there_must_be_a_checkpoint(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run there"):
        export(tmp_path / "nowhere", tmp_path / "out")
    folder = RunFolder.create(make_config())
    with pytest.raises(UserError, match="no checkpoint yet"):
        export(folder.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_of_a_model_that_needs_zeros_says_so(
    make_config: MakeConfig, full_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export(full_run, tmp_path / "plain")
    assert "frames of zeros" not in caplog.text
    folder = RunFolder.create(make_config("model.absent_references=zero"))
    shutil.copytree(full_run / "checkpoints", folder.checkpoints)
    export(folder.path, tmp_path / "zeros")
    assert "inference has to append them" in caplog.text
