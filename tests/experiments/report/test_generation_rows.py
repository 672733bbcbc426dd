"""Metrics of generated clips in a report: identity is never shown without copy-paste beside it."""

from alignlab.experiments.compare.result import Comparison, RunResult
from alignlab.experiments.report.metric_table import QUANTITIES, quantity
from alignlab.experiments.report.summary import by_metric, summary_rows
from alignlab.experiments.report.text import headline
from alignlab.experiments.report.verdict import verdict
from made_comparisons import make_comparison

GENERATED = [name for name in QUANTITIES if name.startswith("gen/")]


def comparison() -> Comparison:
    """Three seeds in which the variant raises everything, of all metrics that there are."""
    results = tuple(
        RunResult(
            variant,
            seed,
            10,
            f"{variant}/{seed}",
            {
                name: 0.5 + 0.01 * seed + (0.3 + 0.003 * seed) * (variant == "ra")
                for name in QUANTITIES
            },
            {},
        )
        for variant in ("none", "ra")
        for seed in range(3)
    )
    return make_comparison(results)


def test_copy_paste_follows_identity_in_every_table() -> None:
    rows = summary_rows(comparison())
    for groups in (by_metric(rows), headline(rows)):
        order = [group[0].metric for group in groups]
        place = order.index("gen/identity_proxy")
        assert order[place + 1] == "gen/copy_paste_proxy"


def test_the_verdict_names_copy_paste_with_identity() -> None:
    found = comparison()
    sentence = verdict(found, summary_rows(found)).variants["ra"]
    identity = sentence.index("raises subject identity (proxy)")
    copy_paste = sentence.index("raises copy-paste (proxy)")
    assert "(better)" in sentence[identity:copy_paste]
    assert "(worse)" in sentence[copy_paste:]


def test_proxies_say_so_and_few_are_headlines() -> None:
    assert all(("_proxy" in name) == ("(proxy)" in quantity(name).label) for name in GENERATED)
    assert sum(quantity(name).headline for name in GENERATED) == 3
    for name in GENERATED:
        ceiling = quantity(name.replace("gen/", "gen_real/"))
        assert ceiling.label == f"{quantity(name).label}, real clips"
        assert (ceiling.better, ceiling.headline) == ("none", False)
