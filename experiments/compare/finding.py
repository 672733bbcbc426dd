"""A published finding that a comparison checks: what a paper claims of variants and the baseline.

It changes no number of any run. `measured.check_expectations` refuses what the runs cannot answer,
`experiments/report/findings.py` judges it.
"""

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from alignlab.config.data import Settings, unknown_name
from alignlab.passwords import without_password

Sentence = Annotated[str, Field(min_length=1), AfterValidator(without_password)]


class Expectation(Settings):
    """What the claim says of one metric of one variant, against the baseline."""

    variant: str
    """A variant of the comparison that is not its baseline."""
    metric: str
    """As `table.csv` names it: `val/flow`, `cross_cos/mean`, `gen/frechet`, `steps_to_target`."""
    change: Literal["lower", "higher"]
    """Which way the variant's number lies from the baseline's, if the claim holds."""
    words: Annotated[str, AfterValidator(without_password)] = ""
    """What the claim itself calls this, such as the number of the paper that it stands for."""


class Finding(Settings):
    """A claim of a paper, and what would have to come out here."""

    claim: Sentence
    """The claim in one sentence."""
    source: Sentence
    """The paper with its arXiv id, and the section, table or page that has the claim."""
    limits: Sentence
    """What the comparison cannot say of the claim, because of its size or its measures."""
    expect: tuple[Expectation, ...] = Field(min_length=1)
    """The finding is reproduced if all of these are."""

    @model_validator(mode="after")
    def _each_is_expected_once(self) -> Self:
        pairs = [(expected.variant, expected.metric) for expected in self.expect]
        for place, (variant, metric) in enumerate(pairs):
            if (variant, metric) in pairs[:place]:
                raise ValueError(f"expect.{place}: {metric} of {variant} is expected twice")
        return self


def refuse_other_variants(finding: Finding, baseline: str, variants: Iterable[str]) -> None:
    """Refuses expectations of what is no variant, or of the baseline against itself.

    Raises:
        ValueError: one line.
    """
    others = [variant for variant in variants if variant != baseline]
    for place, expected in enumerate(finding.expect):
        where = f"finding.expect.{place}.variant"
        if expected.variant == baseline:
            raise ValueError(f"{where}: {baseline} is the baseline, which differs from nothing")
        if expected.variant not in others:
            hint = unknown_name("variant", expected.variant, others)
            raise ValueError(f"{where}: {hint}; finding=null leaves the finding out")
