"""Settings over settings: what edits, what replaces, what removes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.config.merging import canonical, merge
from alignlab.errors import UserError
from alignlab.experiments.sweep.space import apply_values
from alignlab.recipe import load_run

REFALIGN = {"name": "refalign", "weight": 1.0, "blocks": [0, 1, 2]}
REPA = {"name": "repa", "teacher": "dino"}
BASE = {"steps": 3, "objectives": {"ra": REFALIGN}, "flow": {"shift": 5.0, "text_dropout": 0.1}}


@pytest.mark.parametrize(
    ("changes", "objectives"),
    [
        ({}, {"ra": REFALIGN}),
        ({"objectives": {}}, None),
        ({"objectives": None}, None),
        ({"objectives.ra": {}}, None),
        ({"objectives.ra": None}, None),
        ({"objectives": {"ra": None}}, None),
        ({"objectives.ra.weight": 2}, {"ra": {**REFALIGN, "weight": 2}}),
        ({"objectives": {"ra": {"weight": 2}}}, {"ra": {**REFALIGN, "weight": 2}}),
        ({"objectives.ra": REPA}, {"ra": REPA}),
        ({"objectives": {"ra": REPA}}, {"ra": REPA}),
        ({"objectives": {"ra": {"name": "refalign"}}}, {"ra": {"name": "refalign"}}),
        ({"objectives.ra.name": "repa"}, {"ra": {"name": "repa"}}),
        (
            {"objectives.ra.weight": 2, "objectives.ra.name": "repa"},
            {"ra": {"name": "repa", "weight": 2}},
        ),
        (
            {"objectives.ra": {"name": "repa", "gate.kind": "power"}},
            {"ra": {"name": "repa", "gate": {"kind": "power"}}},
        ),
        (
            {"objectives.ra.weight": 2, "objectives.ra": REPA, "objectives.ra.name": "sara"},
            {"ra": {"name": "sara"}},
        ),
        (
            {"objectives.ra.weight": 2, "objectives.ra": {}, "objectives.ra.name": "sara"},
            {"ra": {"name": "sara"}},
        ),
        ({"objectives": {"b": REPA}}, {"ra": REFALIGN, "b": REPA}),
        ({"objectives": {}, "objectives.b": REPA}, {"b": REPA}),
        ({"objectives.b": REPA, "objectives": {}}, None),
        ({"objectives.c": {}}, {"ra": REFALIGN}),
    ],
)
def test_objectives_are_removed_replaced_and_edited(
    changes: dict[str, Any], objectives: dict[str, Any] | None
) -> None:
    assert merge(BASE, changes).get("objectives") == objectives
    assert merge(BASE, canonical(changes)).get("objectives") == objectives


@pytest.mark.parametrize(
    ("changes", "flow"),
    [
        ({"flow": {"shift": 3}}, {"shift": 3, "text_dropout": 0.1}),
        ({"flow.shift": 3}, {"shift": 3, "text_dropout": 0.1}),
        ({"flow": {}}, None),
        ({"flow.shift": None}, {"shift": None, "text_dropout": 0.1}),
    ],
)
def test_a_section_without_a_kind_is_edited(
    changes: dict[str, Any], flow: dict[str, Any] | None
) -> None:
    assert merge(BASE, changes).get("flow") == flow


def test_what_is_given_stays_as_it_was() -> None:
    changes = {"objectives.b": dict(REPA)}
    merge(merge(BASE, changes), {"objectives.b.weight": 3, "objectives.ra.weight": 3})
    assert changes == {"objectives.b": REPA} and BASE["objectives"] == {"ra": REFALIGN}


# Settings and sections have names of their own: no number is ever edited into a mapping.
SETTINGS = st.dictionaries(
    st.sampled_from(["x", "y", "name"]), st.sampled_from(["one", "two", [1], {}]), max_size=3
)
SECTIONS = st.sampled_from(["a", "b", "a.b", "objectives", "objectives.a", "b.a.b"])
PLACES = st.sampled_from(["a.x", "a.b.y", "b.x", "objectives.a.x"])
CHANGES = st.lists(
    st.tuples(SECTIONS, st.recursive(SETTINGS, lambda inner: st.dictionaries(SECTIONS, inner)))
    | st.tuples(PLACES, st.sampled_from([None, 1, "one", {}])),
    max_size=5,
).map(dict)


def test_of_two_edits_of_a_name_the_later_wins() -> None:
    changes: list[dict[str, Any]] = [{"o.name": "x"}, {"o.p": 1}, {"o.name": "y"}]
    assert merge({}, *changes) == {"o": {"name": "y", "p": 1}}
    assert canonical(*changes) == {"o.name": "y", "o.p": 1}


def test_two_kinds_of_one_mapping_keep_their_order() -> None:
    kept = canonical({"o.name": "x"}, {"o.p": 1}, {"o.family": "y"})
    assert list(kept) == list(canonical(kept)) == ["o.name", "o.family", "o.p"]


def test_what_was_removed_twice_is_kept_in_one_form() -> None:
    removed = {"a": {"b.x": 1}, "a.b": {}, "a.b.name": [1]}
    kept = canonical(removed, {"a.b": {}})
    assert list(canonical(kept)) == list(kept)


@given(CHANGES, CHANGES, CHANGES)
def test_canonical_changes_do_the_same_also_when_they_are_read_again(
    base: dict[str, Any], one: dict[str, Any], two: dict[str, Any]
) -> None:
    try:
        start = merge({}, base)
        expected = merge(start, one, two)
    except UserError as error:
        assert "is a list" in str(error)
        return
    kept = canonical(one, two)
    assert merge(start, kept) == expected
    assert canonical(kept) == kept and list(canonical(kept)) == list(kept)


def test_a_sweep_replaces_as_a_variant_does() -> None:
    repa = {"name": "repa", "teacher": "dino", "blocks": [3]}
    run = apply_values(load_run("tiny"), {"objectives.ra": repa})
    assert run.objectives["ra"].weight == 0.5
    assert apply_values(load_run("tiny"), {"objectives": {}}).objectives == {}
