"""Writes the probe of a run: probe.html, one file that needs no network, and probe.csv.

Shape letters: T, H, W, C frames.
"""

import csv
import io
from pathlib import Path

from alignlab.data.video import encode_mp4
from alignlab.evaluation.feature_maps import FeatureClip
from alignlab.evaluation.probe import MODELS, RunProbe, probe_run
from alignlab.experiments.charts.chart import Chart
from alignlab.experiments.charts.look import styles
from alignlab.experiments.probe.figures import MapTable, map_charts, map_tables
from alignlab.experiments.probe.tokens import Table, decimals, scatter_of, similarity_of
from alignlab.experiments.report.escaping import csv_cell
from alignlab.experiments.report.formatting import format_number
from alignlab.experiments.report.page import data_uri, render
from alignlab.runs.atomic_files import write_text
from alignlab.runs.out_paths import out_folder
from alignlab.training.checkpoint import NEWEST, ModelChoice

MEASURES = {
    "cknna": (
        "CKNNA to the teacher",
        "Video tokens: do a token's ten nearest neighbours agree with the teacher's? 0: no more "
        "than by chance, 1: fully.",
    ),
    "cka": (
        "CKA to the teacher",
        "Video tokens: do all similarities among tokens agree with the teacher's? Unbiased: 0 for "
        "unrelated features.",
    ),
    "teacher_retrieval": (
        "Retrieval in teacher space",
        "Reference tokens: share that, mapped linearly to the teacher's space, find a teacher "
        "token of the same subject first.",
    ),
    "silhouette": (
        "Subject silhouette",
        "Reference tokens: are tokens of a subject closer to each other than to the other subjects "
        "of their clip? From \N{MINUS SIGN}1 to 1.",
    ),
    "cross_cos": (
        "Cross-subject cosine",
        "Reference tokens: mean positive cosine between different subjects of a clip; lower is "
        "better told apart.",
    ),
}


def probe(
    run_dir: Path,
    out: Path | None = None,
    *,
    teacher: str | None = None,
    block: int | None = None,
    choice: ModelChoice = NEWEST,
) -> Path:
    """Probes a run, writes `probe.html` and `probe.csv` into `out` and returns the first's path.

    Args:
        run_dir: see `probe_run`, as for all others.
        out: folder; made if need be, its other files are left alone. None: the run's own `probe`.
        teacher: alias of the recipe.
        block: whose tokens are shown one by one.
        choice: which model of the run.

    Raises:
        UserError: as `probe_run`, or `out` cannot be written into.
    """
    is_default, out = out is None, out or run_dir / "probe"
    with out_folder(out, is_default=is_default):
        result = probe_run(run_dir, teacher=teacher, block=block, choice=choice)
        out.mkdir(parents=True, exist_ok=True)
        return write_probe(result, out)


def write_probe(result: RunProbe, out: Path) -> Path:
    """Writes `probe.csv` and `probe.html` into an existing folder."""
    write_text(out / "probe.csv", probe_csv(result))
    path = out / "probe.html"
    write_text(path, _html(result))
    return path


def probe_csv(result: RunProbe) -> str:
    """The map, a row per measure, model, block and noise level."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("measure", "teacher", "model", "block", "depth", "sigma", "value"))
    for c in result.cells:
        cells = (c.measure, result.teacher, c.model, c.block, c.block + 1, c.sigma, c.value)
        rows.writerow(map(csv_cell, cells))
    return text.getvalue()


def _html(result: RunProbe) -> str:
    tables = map_tables(result.cells, MEASURES, result.sigmas)
    sections: dict[str, list[Chart]] = {
        f"map-{table.measure}": map_charts(table, result.aligned) for table in tables
    }
    similarity, subjects, similarity_table = similarity_of(result)
    scatter, names, scatter_table = scatter_of(result)
    sections |= {"similarity": similarity, "scatter": scatter}
    return render(
        "probe.html.j2",
        sections,
        list(styles(names).values()),
        probe=result,
        lead=lead(result, tables),
        tables=tables,
        plain={table.measure: _plain(table) for table in tables},
        subjects=subjects,
        similarity_table=similarity_table,
        scatter_names=names,
        scatter_table=scatter_table,
        clips=_clips(result),
        explained=_explained(result.features),
        token_sigma=f"{result.token_sigma:g}",
        feature_sigma=f"{result.feature_sigma:g}",
        format_number=format_number,
    )


def lead(result: RunProbe, tables: list[MapTable]) -> list[str]:
    """One sentence per measure: its mean over the map before and after, and where it moved most."""
    sentences = []
    for table in tables:
        cells = [
            (row, column, change)
            for row in range(len(table.blocks))
            for column in range(len(table.sigmas))
            if (change := table.change(row, column)) is not None
        ]
        if not cells:
            continue
        before, after = (
            sum(table.values[model][r][c] or 0.0 for r, c, _ in cells) / len(cells)
            for model in MODELS
        )
        row, column, most = max(cells, key=lambda cell: abs(cell[2]))
        block = table.blocks[row]
        sentences.append(
            f"{table.label}: {decimals(before)} before, {decimals(after)} after, mean of the map; "
            f"the largest change is {decimals(most, '+')} at block {block} (depth {block + 1}), "
            f"noise level {table.sigmas[column]:g}."
        )
    return sentences


def _plain(table: MapTable) -> Table:
    rows = []
    for place, block in enumerate(table.blocks):
        texts = []
        for column in range(len(table.sigmas)):
            before, after = (table.values[model][place][column] for model in MODELS)
            texts.append(f"{decimals(before)} → {decimals(after)}")
        rows.append((f"block {block} (depth {block + 1})", *texts))
    head = ("block", *(f"noise level {sigma:g}" for sigma in table.sigmas))
    return Table(f"{table.label}, before → after", head, tuple(rows))


def _clips(result: RunProbe) -> dict[str, str | None]:
    """Clips as data URIs by what they show; None for a clip that is not there."""
    features, fps = result.features, result.config.data.fps
    shown = {"real clip": features.real_THWC}
    shown |= {f"features {model}": frames for model, frames in features.student_THWC.items()}
    shown[f"features of {result.teacher}"] = features.teacher_THWC
    clips = {name: encode_mp4(frames, fps) for name, frames in shown.items()}
    uris: dict[str, str | None] = {name: _uri(content) for name, content in clips.items()}
    generated = None if result.sample is None else _uri(result.sample.read_bytes())
    return uris | {"generated by this run": generated}


def _uri(content: bytes) -> str:
    return data_uri(content, "video/mp4")


def _explained(features: FeatureClip) -> Table:
    head = ("share of variance", *features.explained)
    values = tuple(f"{share:.0%}" for share in features.explained.values())
    return Table("Variance in the three components", head, (("shown as colour", *values),))
