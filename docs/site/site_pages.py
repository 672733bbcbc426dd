"""The pages of the documentation site that are made of the code, as Markdown.

A page says where they stand by a comment, `<!-- site: settings -->`, which GitHub does not show;
`filled` puts them there when the site is built. Definition lists and attributes are MyST's.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

from alignlab.config.setting_rows import SettingRow
from alignlab.evaluation.metric_registry import METRICS, Metric
from alignlab.experiments.recipe_settings import Kind, RecipeSetting, recipe_settings
from alignlab.losses import OBJECTIVES
from command_pages import commands
from markdown_text import code, prose

ROOT = Path(__file__).resolve().parents[2]
LOSSES = ROOT / "losses" / "README.md"

KINDS: dict[Kind, str] = {
    "run": "Runs",
    "comparison": "Comparisons",
    "sweep": "Sweeps",
    "stage1": "Stage 1",
}
READERS: dict[Kind, str] = {
    "run": "runs",
    "comparison": "comparisons",
    "sweep": "sweeps",
    "stage1": "Stage 1",
}
TOP = "At the top of the recipe"
_COMMENT = re.compile(r"<!-- site(?:: (\w+) -->|\n(.*?)\n-->)", re.DOTALL)


def filled(text: str) -> str:
    """A page as the site has it: comments for the site give way to what they stand for.

    Raises:
        KeyError: a comment names a page that is not in `GENERATED`.
    """
    text = _COMMENT.sub(lambda found: GENERATED[found[1]]() if found[1] else found[2], text)
    return _with_one_title(text)


def _with_one_title(text: str) -> str:
    """A page of several titles as sections of the first: the site lists a page under its title."""
    parts = re.split(r"(?ms)^(```.*?^```$)", text)  # `# comment` in code stays
    titles = 0
    for i in range(0, len(parts), 2):
        lines = parts[i].split("\n")
        for n, line in enumerate(lines):
            titles += line.startswith("# ")
            if titles > 1 and re.match("#+ ", line):
                lines[n] = f"#{line}"
        parts[i] = "\n".join(lines)
    return "".join(parts)


def settings() -> str:
    """Every setting of every recipe: name, type, default, meaning, where it comes from."""
    listed = recipe_settings()
    sources = default_sources()
    holders = {s.row.name.rpartition(".")[0] for s in listed}
    holders |= {name.partition(".")[0] for name in holders}
    taken: set[str] = set()
    lines: list[str] = []
    for kind, title in KINDS.items():
        lines += [f"## {title}", ""]
        mine = [(_section(s.row, holders), s) for s in listed if s.recipes[0] == kind]
        mine.sort(key=lambda pair: pair[0] != TOP)  # these first; the order of the others stays
        for section, group in groupby(mine, key=lambda pair: pair[0]):
            lines += [f"### {section}", ""]
            for _, setting in group:
                lines += _entry(setting, _anchor(setting, taken), sources)
    return "\n".join(lines)


def _section(row: SettingRow, holders: set[str]) -> str:
    """The heading under which a setting stands; `holders` are names that have settings below."""
    parts = row.name.split(".")
    if parts[0] == "objectives" and len(parts) > 2:
        return code(".".join(parts[:3] if parts[1] == "ALIAS" else parts[:2]))
    if parts[0] in ("data", "stage1", "space") and row.when:
        return f"{code(parts[0])} with {code(row.when)}"
    return code(parts[0]) if len(parts) > 1 or row.name in holders else TOP


def _anchor(setting: RecipeSetting, taken: set[str]) -> str:
    """What an address ends in that leads to a setting: `setting-optim-lr`, if that is free."""
    row = setting.row
    tag = row.when.partition(": ")[2] or setting.recipes[0]
    names = (f"setting {row.name}", f"setting {row.name} {tag}")
    anchors = (re.sub("[^a-z0-9]+", "-", name.lower()) for name in names)
    anchor = next(anchor for anchor in anchors if anchor not in taken)
    taken.add(anchor)
    return anchor


def _entry(setting: RecipeSetting, anchor: str, sources: dict[str, str]) -> list[str]:
    row = setting.row
    facts = [prose(row.type)]
    if row.type != "section":
        facts.append("required" if row.required else f"default {code(row.shown_default)}")
    module, _, config = row.source.rpartition(".")
    notes = [f"Of {', '.join(READERS[kind] for kind in setting.recipes)}."]
    if row.when:
        notes.append(f"Where {code(row.when)}.")
    if row.name in sources:
        notes.append(f"Default from: {prose(sources[row.name])}.")
    notes.append(f"{code(config)} in {code(file_of(module))}")
    return [
        f"[{code(row.name)}]{{#{anchor}}} [{' · '.join(facts)}]{{.setting-type}}",
        f": {prose(row.meaning)}",
        "",
        f"  [{' '.join(notes)}]{{.setting-source}}",
        "",
    ]


def file_of(module: str) -> str:
    """The file of a module, from the root of the repository."""
    path = module.replace(".", "/") + ".py"
    return path if (ROOT / path).is_file() else path.removeprefix("alignlab/")


def default_sources() -> dict[str, str]:
    """Where defaults of objectives come from, by setting: the tables of losses/README.md."""
    found = {}
    for name, section in loss_sections():
        for table in re.findall(
            r"(?m)^\| setting \| default \| from \|\n.*\n((?:\|.*\n)+)", section
        ):
            for line in table.splitlines():
                setting, _, source = [cell.strip() for cell in line.strip("|").split("|", 2)]
                found[f"objectives.{name}.{setting.strip('`')}"] = source.rstrip(". ")
    return found


def loss_sections() -> Iterator[tuple[str, str]]:
    """The section of each objective in losses/README.md, by its name."""
    for section in re.split(r"(?m)^## ", LOSSES.read_text())[1:]:
        name = section.partition("\n")[0].strip("`")
        if name in OBJECTIVES:
            yield name, section


def pitfalls() -> str:
    """The pitfalls of each objective, out of losses/README.md."""
    lines: list[str] = []
    for name, section in loss_sections():
        found = re.search(r"(?ms)^\*\*Pitfalls\.\*\*\n(.*)", section)
        if found is None:
            raise ValueError(f"losses/README.md: {name} has no pitfalls")
        lines += [f"## {code(name)}", "", found[1].strip(), ""]
    return "\n".join(lines).replace("](#", "](../losses/README.md#")


def metrics() -> str:
    """Every metric of a run, as the table of metrics has it."""
    lines: list[str] = []
    for title, chosen in (
        ("Validation", lambda name: name.startswith("val/")),
        ("Tokens of a block", lambda name: "/" not in name),
        ("Generated clips", lambda name: name.startswith("gen/")),
    ):
        rows = {name: metric for name, metric in METRICS.items() if chosen(name)}
        lines += [f"## {title}", "", *_metric_table(rows), ""]
    return "\n".join(lines)


def _metric_table(rows: dict[str, Metric]) -> Iterable[str]:
    yield "| metric | what it is | better | needs |"
    yield "|---|---|---|---|"
    for name, metric in rows.items():
        label = f"**{prose(metric.label)}**" if metric.headline else prose(metric.label)
        unit = f", in {metric.unit}" if metric.unit else ""
        better = "neither" if metric.better == "none" else metric.better
        yield f"| {code(name)} | {label}{unit} | {better} | {', '.join(metric.needs)} |"


GENERATED: dict[str, Callable[[], str]] = {
    "settings": settings,
    "metrics": metrics,
    "commands": commands,
    "pitfalls": pitfalls,
}
"""By the name in a page's comment."""
