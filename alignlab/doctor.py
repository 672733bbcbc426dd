"""What works on this machine: versions, devices, attention backends, kernels, models."""

import os
import platform
import shutil
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

import alignlab
from alignlab.data.registry import installed_datasets
from alignlab.environment import PACKAGES as ENVIRONMENT_PACKAGES
from alignlab.environment import package_version, use_own_kernel_rows
from alignlab.evaluation.own_metrics import installed_metrics
from alignlab.kernels import speed_table
from alignlab.kernels.plugins import reason_of
from alignlab.kernels.registry import OPERATIONS, installed_kernels
from alignlab.models.attention_backends import BackendState, available_backends
from alignlab.models.model_files import on_disk
from alignlab.teachers import TEACHERS
from alignlab.teachers.wheels import WHEELS
from alignlab.units import GIB

# Distribution -> the extra of alignlab that brings it, "" for what is always needed.
PACKAGES = {
    **dict.fromkeys(ENVIRONMENT_PACKAGES, ""),
    "optuna": "",
    "mlflow": "",
    "pydantic": "",
    "omegaconf": "",
    "av": "",
    "opencv-python-headless": "",
    "scipy": "",
    "xformers": "gpu",
    "bitsandbytes": "bitsandbytes",
    "ray": "ray",
    "sam2": "sam2",
}
WAN_MODELS = ("assets/tiny-wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")


def print_diagnosis(console: Console | None = None) -> None:
    """Print `diagnosis` as tables; a thing that does not work comes with its reason."""
    console = console or Console()
    found = diagnosis()
    console.print(_table("Versions", ("package", "version"), found["versions"]))
    console.print(_table("Devices", ("device", "what it is"), found["devices"]))
    for device, states in found["attention"].items():
        title = f"Attention backends on {device} (model.attention)"
        console.print(_table(title, ("backend", "state"), states))
    console.print(_table("Kernels", ("kernel", "state"), found["kernels"]))
    if found["metrics"]:
        title = "Metrics of other packages (eval.metrics)"
        console.print(_table(title, ("metric", "state"), found["metrics"]))
    if found["data"]:
        title = "Data sets of other packages (data.name)"
        console.print(_table(title, ("data set", "state"), found["data"]))
    console.print(_table("Models", ("model", "state"), found["models"]))


def diagnosis() -> dict[str, dict[str, Any]]:
    """Everything below: `versions`, `devices`, `attention` (by device), `kernels`, `models`.

    And `metrics` and `data` of other packages. Each maps a thing's name to its state.
    """
    devices = device_lines()
    kernels = [
        (f"{name}, impl={impl}", why or "works")
        for name, operation in OPERATIONS.items()
        for impl, why in operation.implementations().items()
    ]
    kernels += [
        (f"{one.name} (package {one.package})", one.problem)
        for one in installed_kernels()
        if one.problem is not None
    ]
    return {
        "versions": package_versions(),
        "devices": devices,
        "attention": {device: dict(attention_states(device)) for device in devices},
        "kernels": dict([*kernels, *auto_states()]),
        "metrics": metric_states(),
        "data": data_states(),
        "models": model_states(),
    }


def package_versions() -> dict[str, str]:
    """Versions of Python, alignlab and the packages it stands on."""
    versions = {"python": platform.python_version(), "alignlab": alignlab.__version__}
    for package, extra in PACKAGES.items():
        missing = f"missing (extra {extra})" if extra else "missing"
        versions[package] = package_version(package) or missing
    return versions


def device_lines() -> dict[str, str]:
    """Torch device -> what it is."""
    free = shutil.disk_usage(".").free / GIB
    lines = {
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch "
        f"threads, {free:.0f} GiB of disk free here"
    }
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        lines[f"cuda:{index}"] = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.total_memory / GIB:.0f} GiB"
        )
    if torch.backends.mps.is_available():
        lines["mps"] = "Apple GPU"
    return lines


def attention_states(device: str) -> list[tuple[str, str]]:
    """What each attention backend can do in a Wan block on `device`; those that train come first.

    Both precisions that a recipe may have (`model.precision`) are tried.
    """
    bf16 = available_backends(device, precision="bf16")
    fp32 = available_backends(device, precision="fp32")

    def rank(name: str) -> tuple[bool, ...]:
        abilities = (bf16[name].ability, fp32[name].ability)
        return *(one != "trains" for one in abilities), "inference only" not in abilities

    return [(name, _in_both(bf16[name], fp32[name])) for name in sorted(bf16, key=rank)]


def _in_both(bf16: BackendState, fp32: BackendState) -> str:
    if bf16.ability == fp32.ability == "trains":
        return "trains in bf16 and fp32"
    if bf16.ability == "trains":
        return f"trains in bf16; fp32 {fp32}"
    if fp32.ability == "trains":
        return f"trains in fp32; bf16 {bf16}"
    return str(bf16) if bf16.ability == fp32.ability else f"bf16 {bf16}; fp32 {fp32}"


def auto_states() -> list[tuple[str, str]]:
    """What `impl=auto` goes by on each GPU, and why it goes by nothing."""
    use_own_kernel_rows()
    states = []
    for index in range(torch.cuda.device_count()):
        table = speed_table.table_of(torch.cuda.get_device_name(index))
        why = f" ({table.problem})" if table.problem else ""
        shown = str(table) if table.decisions else f"chunked, no kernel was measured on it{why}"
        states.append((f"impl=auto on cuda:{index}", shown))
    return states


def metric_states() -> dict[str, str]:
    """Metrics of generated clips that other packages register, and why one cannot be measured."""
    states = {}
    for one in installed_metrics():
        why = one.problem if one.row is None else reason_of(one.row.missing)
        states[f"{one.name} (package {one.package} {one.version})"] = why or "works"
    return states


def data_states() -> dict[str, str]:
    """Data sets that other packages register, and why one cannot be used."""
    return {
        f"{one.name} (package {one.package} {one.version})": one.problem or "works"
        for one in installed_datasets()
    }


def model_states() -> dict[str, str]:
    """Wan models, and the models of teachers that recipes name by family alone: where they are."""
    teachers = {teacher.path: f"teacher {family}" for family, teacher in TEACHERS.items()}
    wan = dict.fromkeys(WAN_MODELS, "Wan")
    kinds = wan | {path: kind for path, kind in teachers.items() if path not in wan}
    return {f"{path} ({kind})": _where(path) for path, kind in kinds.items()}


def _where(path: str) -> str:
    folder = on_disk(path)
    if folder is not None:
        return str(folder)
    fix = next((wheel.fix for wheel in WHEELS.values() if wheel.path == path), None)
    if fix is not None:
        return f"not on this machine: {fix}"
    for marker in ("model_index.json", "config.json"):
        try:
            cached = try_to_load_from_cache(path, marker)
        except HFValidationError:  # a path of files, which no hub has
            return "not on this machine"
        if isinstance(cached, str):
            return os.path.dirname(cached)
    return "not on this machine; downloaded from the hub on first use"


def _table(title: str, header: tuple[str, str], rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_lines=False)
    table.add_column(header[0], no_wrap=True)
    table.add_column(header[1], overflow="fold")
    for name, state in rows.items():
        table.add_row(Text(name), Text(state))  # plain: brackets are no markup
    return table
