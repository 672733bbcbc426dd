"""The texts that a run reads, encoded before it computes, so that their encoder can leave."""

from collections.abc import Iterable

from alignlab.sampling import negative_text
from alignlab.training.batches import drawn_clips
from alignlab.training.kept_text import encode_ahead
from alignlab.training.setup import Run


def encode_training_texts(run: Run) -> None:
    """Encodes what the steps that are left draw on this rank, and on rank 0 what is measured.

    With `model.text_encoder: keep` each text is encoded when it is read, as where texts are not
    kept.

    Raises:
        UserError: an embedding is not finite.
    """
    texts = run.clips.captions(_drawn(run))
    if run.ranks.is_main:
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


def _drawn(run: Run) -> Iterable[int]:
    """Train clips of the steps that are left."""
    config = run.config
    batches = run.ranks.micro_batches(config.optim.accumulate, config.optim.batch_size)
    samples = [sample for batch in batches for sample in batch]
    steps = range(run.state.step, config.steps)
    return drawn_clips(len(run.clips), config.seed, steps, samples)
