"""The share of the alignment loss in a training step, on a transformer small enough for a CPU."""

import pytest
import torch

from alignlab.experiments.loss_share import SIZES, measure_share


def test_every_side_is_timed_and_the_plain_step_has_no_share() -> None:
    shares = measure_share(
        SIZES["smoke"], ["eager", "chunked"], references=2, steps=2, device=torch.device("cpu")
    )
    assert [share.side for share in shares] == ["none", "eager", "chunked"]
    assert shares[0].share == 0 and all(share.step_s > 0 for share in shares)
    assert len({share.parameters for share in shares}) == 1


def test_an_implementation_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="impl='triton' cannot run"):
        measure_share(SIZES["smoke"], ["triton"], steps=1, device=torch.device("cpu"))
