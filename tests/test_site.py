"""The documentation site: pages that are made of the code say all of it; the whole builds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import site_pages
from alignlab.evaluation.metric_registry import METRICS
from alignlab.experiments.recipe_settings import recipe_settings
from alignlab.losses.registry import BUILT_IN
from check_site import problems
from command_pages import commands, leaves
from docstrings import as_rst
from markdown_text import prose

ROOT = Path(__file__).parents[1]


def test_every_setting_is_on_the_settings_page_with_all_that_is_known_of_it() -> None:
    page = site_pages.settings()
    entries = re.findall(r"^\[`(.+?)`\]\{#(.+?)\} \[(.+)\]\{\.setting-type\}\n: (.+)\n", page, re.M)
    listed = recipe_settings()
    shown = {
        (name, type_and_default.split(" · ")[0], text)
        for name, _, type_and_default, text in entries
    }
    assert {(s.row.name, prose(s.row.type), prose(s.row.meaning)) for s in listed} == shown
    anchors = [anchor for _, anchor, _, _ in entries]
    assert len(entries) == len(listed) == len(set(anchors)) > 250
    assert "setting-optim-lr" in anchors
    assert "`AdamWConfig` in `alignlab/config/optim.py`" in page
    assert "`RepaConfig` in `losses/repa.py`" in page


def test_a_setting_of_an_objective_says_where_its_default_came_from() -> None:
    sources = site_pages.default_sources()
    assert sources["objectives.refalign.neg_margin"] == "code; the paper's value is not known"
    for name in BUILT_IN:
        assert sources[f"objectives.{name}.weight"] and sources[f"objectives.{name}.blocks"]
    names = {setting.row.name for setting in recipe_settings()}
    assert sources.keys() <= names, "losses/README.md has a default of a setting that is not there"
    assert "Default from: code; the paper's value is not known." in site_pages.settings()


def test_every_command_is_on_the_commands_page_with_its_options() -> None:
    sections = re.split(r"(?m)^## ", commands())
    by_name = {section.partition("\n")[0].strip("`"): section for section in sections}
    found = list(leaves())
    assert len(found) > 30
    for words, command in found:
        section = by_name[" ".join(words)]
        assert prose(command.help.split("\n\n")[0]) in section
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert all(option in section for option in parameter.opts if option != "--help")


def test_every_metric_and_every_objectives_pitfalls_have_their_place() -> None:
    metrics, pitfalls = site_pages.metrics(), site_pages.pitfalls()
    assert all(f"| `{name}` |" in metrics for name in METRICS)
    assert all(f"\n## `{name}`\n" in f"\n{pitfalls}" for name in BUILT_IN)
    assert "](#" not in pitfalls, "a link within losses/README.md leads nowhere on another page"


def test_every_loss_function_of_the_formulas_is_under_python() -> None:
    formulas = (ROOT / "losses" / "README.md").read_text()
    functions = set(re.findall(r"`(\w+)\((?:student|teacher|visual)_", formulas))
    page = (ROOT / "docs" / "api" / "losses.md").read_text()
    assert len(functions) >= 8
    assert [name for name in functions if f".{name}\n" not in page] == []


def test_comments_for_the_site_are_filled_and_later_titles_become_sections() -> None:
    page = (
        "# One\n\n## A\n\n<!-- site\nonly there\n-->\n\n# Two\n\n```sh\n# a comment\n```\n\n## B\n"
    )
    filled = site_pages.filled(page)
    assert "\nonly there\n" in filled and "<!--" not in filled
    assert re.findall(r"(?m)^#+ .*$", filled) == ["# One", "## A", "## Two", "# a comment", "### B"]
    with pytest.raises(KeyError, match="no_such"):
        site_pages.filled("<!-- site: no_such -->")


def test_a_docstring_keeps_its_code_and_no_character_becomes_markup() -> None:
    doc = [
        "Gives `a * b` of *x*, |y| and several `Tensor`s:",
        "",
        "    a * b_",
        "",
        "Ends in name_.",
    ]
    assert as_rst(doc) == [
        r"Gives ``a * b`` of \*x\*, \|y\| and several ``Tensor``\ s::",
        "",
        "    a * b_",
        "",
        r"Ends in name\_.",
    ]


def test_what_stands_before_a_colon_is_no_type() -> None:
    doc = ["Does it.", "", "Returns:", "    Both. Of nothing: 0."]
    assert as_rst(doc)[2:] == ["Returns:", "    \\ ", "    Both. Of nothing: 0."]
    assert as_rst(["All numbers: one a row."], is_value=True)[0] == "\\ "


def test_options_in_help_are_code() -> None:
    assert prose("Of --power, [0, 1]; `a --b c`") == r"Of `--power`, \[0, 1\]; `a --b c`"


def test_a_page_that_asks_another_host_or_leads_nowhere_is_seen(tmp_path: Path) -> None:
    good = '<a href="https://example.org">x</a><a href="b.html#there">y</a><img src="p.png">'
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "b.html").write_text('<h1 id="there">B</h1><a href="a.html">a</a>')
    (tmp_path / "p.png").write_bytes(b"")
    assert problems(tmp_path) == []
    (tmp_path / "b.html").write_text('<script src="https://cdn.example.org/x.js"></script>')
    (tmp_path / "s.css").write_text("@import url(//fonts.example.org/x.css);")
    found = "\n".join(problems(tmp_path))
    assert "b.html: asks https://cdn.example.org/x.js" in found
    assert "s.css: asks //fonts.example.org/x.css" in found
    assert "a.html: leads to b.html#there, which is not there" in found


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    options = ["-W", "--keep-going", "-q", "-c", "docs/site", "-b", "html"]
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "sphinx",
            *options,
            "-d",
            tmp_path / "trees",
            ".",
            tmp_path / "site",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert problems(tmp_path / "site") == []
    page = (tmp_path / "site" / "docs" / "settings.html").read_text()
    for setting in recipe_settings():
        assert f">{setting.row.name}</span>" in page, setting.row.name
