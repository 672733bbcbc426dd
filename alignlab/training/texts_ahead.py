"""The texts that a run reads, encoded before it computes, so that their encoder can leave."""

from collections.abc import Iterable, Sequence

from alignlab.sampling import negative_text
from alignlab.training.batches import drawn_clips
from alignlab.training.kept_text import encode_ahead, encode_missing
from alignlab.training.setup import Run


def encode_training_texts(run: Run, first: int) -> None:
    """Encodes what the steps that are left draw on this rank, and on rank 0 what is measured.

    The ranks share what all of them draw. With `model.text_encoder: keep` each text is encoded when
    it is read, as where texts are not kept.

    Args:
        run: that is trained; its state may still be that of step 0.
        first: step that is left, from 0.

    Raises:
        UserError: an embedding is not finite.
    """
    config, ranks = run.config, run.ranks
    if config.model.text_encoder == "keep":
        return
    if ranks.world_size > 1:
        drawn = run.clips.captions(_drawn(run, first, range(config.optim.batch_size)))
        share = list(drawn)[ranks.rank :: ranks.world_size]
        encode_missing(run.caches.values, run.wan.text, {text: drawn[text] for text in share})
        ranks.barrier()  # what this one lacks then is of a rank that kept nothing
    batches = ranks.micro_batches(config.optim.accumulate, config.optim.batch_size)
    samples = [sample for batch in batches for sample in batch]
    texts = run.clips.captions(_drawn(run, first, samples))
    if ranks.is_main or run.state.is_in_shards:  # then all of them sample
        texts |= _measured_texts(run, generation=True)
    _encode(run, texts)


def encode_measured_texts(run: Run, *, generation: bool) -> None:
    """Encodes what an evaluation reads; likewise.

    Args:
        run: that is evaluated.
        generation: clips are generated as well.

    Raises:
        UserError: as `encode_training_texts`.
    """
    _encode(run, _measured_texts(run, generation=generation))


def _encode(run: Run, texts: dict[str, str]) -> None:
    if run.config.model.text_encoder == "keep":
        return
    encode_ahead(run.caches.values, run.wan.text, {**texts, "": "the empty prompt"})


def _measured_texts(run: Run, *, generation: bool) -> dict[str, str]:
    settings = run.config.eval
    count = settings.num_read_clips if generation else settings.clips
    texts = run.val_clips.captions(range(min(count, len(run.val_clips))))
    if generation and (settings.sample_clips or settings.num_measured_clips):
        texts[negative_text(settings.negative_prompt)] = "eval.negative_prompt"
    return texts


def _drawn(run: Run, first: int, samples: Sequence[int]) -> Iterable[int]:
    """Train clips of samples of the steps that are left."""
    steps = range(first, run.config.steps)
    return drawn_clips(len(run.clips), run.config.seed, steps, samples)
