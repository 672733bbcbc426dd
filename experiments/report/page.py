"""Pages that need no network: style, script, charts and clips are inside one HTML file."""

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from pydantic import JsonValue

from alignlab.experiments.charts.chart import Chart, inline_svg, placed_readouts
from alignlab.experiments.charts.look import Style, page_colours, swatch
from alignlab.experiments.report.escaping import visible


def render(
    template: str,
    sections: Mapping[str, Sequence[Chart]],
    styles: Sequence[Style],
    **values: Any,
) -> str:
    """A template of this folder as a page with its charts inside.

    Args:
        template: file name; it includes `page.css.j2` and `page.js.j2`, imports the macros of
            `charts.html.j2`, and writes out `readouts` in a script.
        sections: charts by the name of the section that shows them.
        styles: of what the charts tell apart, in the order of their numbers.
        values: what the template reads.
    """
    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    drawn: dict[str, Markup] = {}
    readouts: dict[str, JsonValue] = {}
    for section, charts in sections.items():
        for index, chart in enumerate(charts):
            name = f"{section}-{index}"
            drawn[name] = Markup(inline_svg(chart.svg, name))
            readouts[name] = placed_readouts(chart)
    content: JsonValue = {
        "names": [visible(style.name) for style in styles],
        "colours": [style.variable for style in styles],
        "charts": readouts,
    }
    environment.globals.update(drawn=drawn, sections=sections)
    return environment.get_template(template).render(
        # A caption or a variant could hold "</script>": no "<" survives.
        readouts=Markup(json.dumps(content, allow_nan=False).replace("<", "\\u003c")),
        colours=page_colours(),
        swatches={style.name: Markup(swatch(style)) for style in styles},
        **values,
    )


def data_uri(content: bytes, media_type: str) -> str:
    """A file's bytes as an address that holds them, such as "data:image/png;base64,..."."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def _source(name: str) -> str:
    templates = resources.files("alignlab.experiments.report").joinpath("templates")
    return templates.joinpath(name).read_text(encoding="utf-8")
