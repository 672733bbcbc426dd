"""The dataset cache changes no bit of a run, and reads nothing that it does not need."""

from collections.abc import Callable

import pytest

from alignlab.config.run import RunConfig
from alignlab.dataset_cache.store import Counts
from alignlab.errors import UserError
from alignlab.train import train
from alignlab.training.setup import new_caches
from loaded_models import LoadedModels
from run_contents import timeless_rows

MakeConfig = Callable[..., RunConfig]

BOTH = (
    "steps=3",
    "data.references=[0,3]",
    "optim.batch_size=3",
    "flow.reference_dropout=0.3",
    "objectives.rp={name: repa, teacher: dino, blocks: [3], projector_dim: 32}",
)


def trained(config: RunConfig) -> tuple[object, dict[str, bytes], dict[str, Counts]]:
    """Rows of the log, weights, and what the run did with the cache."""
    caches = new_caches(config)
    folder = train(config, caches=caches)
    (newest,) = (folder / "checkpoints").iterdir()
    found = {p.name: p.read_bytes() for p in newest.iterdir() if p.suffix == ".safetensors"}
    assert found
    return timeless_rows(folder), found, caches.values.cache.counts


def test_a_run_is_the_same_with_the_cache_off_cold_and_warm(make_config: MakeConfig) -> None:
    def run(name: str, mode: str) -> tuple[object, dict[str, bytes], dict[str, Counts]]:
        return trained(make_config(*BOTH, f"name={name}", f"data.cache.mode={mode}"))

    off, cold = run("live", "off"), run("cold", "write")
    assert cold[:2] == off[:2]
    assert all(count.hits + count.misses == 0 for count in off[2].values())
    assert all(count.written == count.misses > 0 for count in cold[2].values())
    for mode in ("write", "read", "require"):
        warm = run(f"warm-{mode}", mode)
        assert warm[:2] == off[:2]
        for kind, count in warm[2].items():
            assert (count.misses, count.written) == (0, 0) and count.hits > 0, (mode, kind)


def test_a_run_with_other_objectives_shares_what_is_the_same(make_config: MakeConfig) -> None:
    trained(make_config("name=first", aligned=False))
    repa = "objectives.rp={name: repa, teacher: dino, blocks: [3], projector_dim: 32}"
    settings = ("steps=2", repa)
    off = trained(make_config("name=live", *settings, "data.cache.mode=off"))
    later = trained(make_config("name=later", *settings))
    assert later[:2] == off[:2]
    assert all(later[2][kind].misses == 0 for kind in ("text", "video", "reference"))
    assert later[2]["teacher"].misses > 0


@pytest.mark.parametrize("kind", ["texts", "latents", "teachers"])
def test_kinds_are_switched_off_one_by_one(make_config: MakeConfig, kind: str) -> None:
    plain = trained(make_config("name=plain", "data.cache.mode=off"))
    found = trained(make_config(f"name=no-{kind}", f"data.cache.{kind}=false"))
    assert found[:2] == plain[:2]
    kinds = {"texts": {"text"}, "latents": {"video", "reference"}, "teachers": {"teacher"}}
    assert {k for k, count in found[2].items() if not count.written} == kinds[kind]


def test_a_rounded_cache_gives_the_same_cold_and_warm(make_config: MakeConfig) -> None:
    lossy = (*BOTH, "data.cache.dtype=int8")
    cold = trained(make_config(*lossy, "name=cold"))
    warm = trained(make_config(*lossy, "name=warm", "data.cache.mode=require"))
    unkept = trained(
        make_config(*lossy, "name=unkept", "data.cache.mode=read", "data.cache.path=nowhere")
    )
    assert cold[:2] == warm[:2] == unkept[:2]
    exact = trained(make_config(*BOTH, "name=exact"))
    assert exact[0] != cold[0]


def test_what_a_required_cache_lacks_is_named(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="alignlab cache build") as info:
        train(make_config("data.cache.mode=require"))
    assert "\n" not in str(info.value)


def test_a_warm_run_loads_no_frozen_model_and_decodes_no_clip(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, loaded_models: LoadedModels
) -> None:
    cold = trained(make_config(*BOTH, "name=cold"))
    assert loaded_models.counts == {"UMT5EncoderModel": 1, "AutoencoderKLWan": 1, "Dinov2Model": 1}

    def never(*args: object, **settings: object) -> None:
        raise AssertionError

    monkeypatch.setattr("alignlab.data.shapes.dataset.render", never)
    warm = trained(make_config(*BOTH, "name=warm", "data.cache.mode=require"))
    assert warm[:2] == cold[:2]
    assert sum(loaded_models.counts.values()) == 3  # as before


def test_runs_of_a_process_share_the_frozen_encoders(
    make_config: MakeConfig, loaded_models: LoadedModels
) -> None:
    plain = make_config("name=one", "data.cache.mode=off", aligned=False)
    caches = new_caches(plain)
    train(plain, caches=caches)
    train(plain.model_copy(update={"name": "two"}), caches=caches)
    assert loaded_models.counts["UMT5EncoderModel"] == loaded_models.counts["AutoencoderKLWan"] == 1


def test_a_generated_clip_loads_the_autoencoder_when_it_is_decoded(
    make_config: MakeConfig, loaded_models: LoadedModels
) -> None:
    settings = ("eval.sample_clips=1", "eval.clips=2", "steps=1")
    trained(make_config(*settings, "name=cold"))
    loaded_models.counts.clear()
    trained(make_config(*settings, "name=warm", "data.cache.mode=require"))
    assert loaded_models.counts == {"AutoencoderKLWan": 1, "Dinov2Model": 1}
