"""Pages that need no network: style, script, charts and clips are inside one HTML file."""

import base64
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import plotly.offline
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from pydantic import JsonValue

from alignlab.experiments.report.escaping import visible


def render(template: str, figures: Mapping[str, JsonValue], **values: Any) -> str:
    """A template of this folder as a page with plotly.js and its figures inside.

    Args:
        template: file name; it includes `page.css.j2` and `page.js.j2`, and writes out `plotly` and
            `figures` in scripts.
        figures: plotly figures by the name that a `.plot` element has in `data-figure`.
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
    return environment.get_template(template).render(
        # A caption or a variant could hold "</script>": no "<" survives.
        figures=Markup(json.dumps(_visible(figures), allow_nan=False).replace("<", "\\u003c")),
        plotly=Markup(plotly.offline.get_plotlyjs()),
        **values,
    )


def _visible(content: Any) -> Any:
    """Figures whose texts are those that the template writes, which finds traces by them."""
    match content:
        case str():
            return visible(content)
        case Mapping():
            return {key: _visible(value) for key, value in content.items()}
        case list() | tuple():
            return [_visible(value) for value in content]
    return content


def data_uri(content: bytes, media_type: str) -> str:
    """A file's bytes as an address that holds them, such as "data:image/png;base64,..."."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def _source(name: str) -> str:
    templates = resources.files("alignlab.experiments.report").joinpath("templates")
    return templates.joinpath(name).read_text(encoding="utf-8")
