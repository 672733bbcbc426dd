"""Where both experts of a tiny A14B pipeline are while clips are generated."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

from alignlab.config.model import ModelConfig
from alignlab.models import other_expert
from alignlab.models.other_expert import OtherExpert
from alignlab.models.reference_branch import ReferenceBranch
from alignlab.models.wan import load_wan
from tiny_wan22 import BOUNDARY, write_a14b

HIGH, LOW = BOUNDARY + 0.01, BOUNDARY - 0.01
GPU = torch.device("meta")  # stands in for one: nothing is moved there


@pytest.fixture(scope="module")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_a14b(tmp_path_factory.mktemp("a14b"))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_one_expert_at_a_time_is_on_the_gpu(
    expert: Any, keeps: bool, a14b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = load_wan(str(a14b), expert=expert).transformer
    model = ModelConfig(path=str(a14b), expert=expert)
    places: WeakKeyDictionary[torch.nn.Module, torch.device] = WeakKeyDictionary({trained: GPU})
    most = 0

    def recorded(transformer: torch.nn.Module, device: torch.device) -> None:
        nonlocal most
        places[transformer] = device
        most = max(most, list(places.values()).count(GPU))

    monkeypatch.setattr(other_expert, "move", recorded)
    wan: Any = SimpleNamespace(transformer=trained, device=GPU)
    with (
        ReferenceBranch.of(trained, model) as branch,
        OtherExpert(wan, model, keeps=keeps) as other,
    ):
        for level in [HIGH, HIGH, LOW, LOW] * 2:  # two clips
            used = other.branch_at(level, branch)
            assert (used is branch) == ((level == HIGH) == (expert == "high"))
            network = trained if used is branch else other._late.loaded()
            assert places[network] == GPU
            if used is branch:
                assert other.is_loaded == (keeps and other.num_loads > 0)
            del used, network  # what is freed is gone
    assert not other.is_loaded and places[trained] == GPU
    assert other.num_loads == (1 if keeps else 2)
    assert most == 1


def test_an_interrupted_clip_leaves_the_trained_expert_on_the_gpu(
    a14b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = load_wan(str(a14b), expert="high").transformer
    model = ModelConfig(path=str(a14b), expert="high")
    moves: list[tuple[bool, torch.device]] = []
    monkeypatch.setattr(
        other_expert, "move", lambda network, device: moves.append((network is trained, device))
    )
    wan: Any = SimpleNamespace(transformer=trained, device=GPU)
    with (
        pytest.raises(KeyboardInterrupt),
        ReferenceBranch.of(trained, model) as branch,
        OtherExpert(wan, model, keeps=True) as other,
    ):
        other.branch_at(LOW, branch)
        raise KeyboardInterrupt
    assert moves[0] == (True, torch.device("cpu")) and moves[-1] == (True, GPU)
    assert not other.is_loaded
