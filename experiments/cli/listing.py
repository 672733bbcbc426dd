"""`alignlab list`: what can be named in a recipe, as tables or as JSON."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignlab.cli_tables import AsJson, print_json, print_table

if TYPE_CHECKING:
    from alignlab.teachers.registry import TeacherRow

list_app = typer.Typer(help="What can be named in a recipe.", no_args_is_help=True)

READS = {
    "teacher": "a teacher",
    "self": "the student's own average",
    "latents": "the clean latents",
    "nothing": "nothing else",
}
TITLES = {
    "run": "Runs, and the runs of comparisons and sweeps",
    "comparison": "Comparisons",
    "sweep": "Sweeps",
    "stage1": "Stage 1 trainings, where they differ",
}


@list_app.command("objectives")
def list_objectives(as_json: AsJson = False) -> None:
    """Alignment losses and their defaults."""
    from alignlab.losses import OBJECTIVES

    rows: list[dict[str, Any]] = []
    for name, objective in OBJECTIVES.items():
        fields = objective.Config.model_fields
        blocks = None if fields["blocks"].is_required() else list(fields["blocks"].default)
        row: dict[str, Any] = {"name": name, "about": _about(objective), "tokens": objective.tokens}
        row["reads"] = objective.reads
        row |= {"weight": fields["weight"].default, "blocks": blocks, "paper": objective.paper}
        rows.append(row)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        facts = [f"{row['tokens']} tokens", f"reads {READS[row['reads']]}"]
        facts.append(f"weight {row['weight']}")
        if row["blocks"] is not None:
            facts.append(f"blocks {', '.join(map(str, row['blocks']))}")
        if row["paper"]:
            facts.append(f"arXiv {row['paper']}")
        typer.secho(row["name"], bold=True)
        typer.echo(f"  {row['about']}\n  {'; '.join(facts)}")


@list_app.command("teachers")
def list_teachers(as_json: AsJson = False) -> None:
    """Families of frozen models to align to: tokens of the model at `path`, and who uses it."""
    from alignlab.teachers import TEACHERS

    if as_json:
        keys = ("path", "feature", "reads", "video", "width", "patch", "native_size", "papers")
        print_json([{"name": n, **{k: getattr(r, k) for k in keys}} for n, r in TEACHERS.items()])
        return
    for name, row in TEACHERS.items():
        typer.secho(name, bold=True)
        typer.echo(f"  {row.path}, {row.feature}, unless set\n  {'; '.join(_teacher_facts(row))}")


def _teacher_facts(row: "TeacherRow") -> list[str]:
    """What it takes, tokens of the model at its path, and which works on alignment use it."""
    takes = "latents" if row.reads == "latents" else "clips" if row.video else "frames"
    facts = [f"takes {takes}"]
    if row.width is not None:
        facts.append(f"tokens {row.width} wide, of {row.patch}x{row.patch} pixels")
    if row.native_size is not None:
        facts.append(f"image size {row.native_size}")
    if row.papers:
        facts.append(f"used by {', '.join(row.papers)}")
    return facts


@list_app.command("metrics")
def list_metrics(as_json: AsJson = False) -> None:
    """What a run measures, and which way is better; metrics of other packages as well."""
    from alignlab.evaluation.metric_registry import METRICS
    from alignlab.evaluation.own_metrics import installed_metrics

    keys = ("label", "unit", "better")
    rows: list[dict[str, Any]] = [
        {"name": name, **{key: getattr(metric, key) for key in keys}, "package": None}
        for name, metric in METRICS.items()
    ]
    for one in installed_metrics():
        if one.row is not None:
            facts = {key: getattr(one.row, key) for key in keys}
            rows.append({"name": f"gen/{one.name}", **facts, "package": one.package})
    if as_json:
        print_json(rows)
        return
    shown = []
    for row in rows:
        package = f" (package {row['package']}, with eval.metrics)" if row["package"] else ""
        shown.append((row["name"], row["label"] + package, row["unit"] or "-", row["better"]))
    print_table(("metric", "what it is", "unit", "better"), shown)


@list_app.command("recipes")
def list_recipes(as_json: AsJson = False) -> None:
    """Recipes that come with alignlab."""
    from alignlab.config.recipe_file import shipped_recipes

    recipes = shipped_recipes()
    if as_json:
        print_json([{"name": name, "about": about} for name, about in recipes.items()])
        return
    print_table(("recipe", "what it is"), list(recipes.items()))


@list_app.command("data")
def list_data(as_json: AsJson = False) -> None:
    """Data sets and their settings."""
    from alignlab.config.setting_rows import first_paragraph, setting_rows
    from alignlab.data.registry import DATASETS

    settings = {name: list(setting_rows(row.config, "data")) for name, row in DATASETS.items()}
    if as_json:
        about = {name: first_paragraph(row.config) for name, row in DATASETS.items()}
        rows = {name: [row.as_json() for row in settings[name]] for name in DATASETS}
        print_json([{"name": n, "about": about[n], "settings": rows[n]} for n in DATASETS])
        return
    for name, listed in settings.items():
        shown = [(r.name, r.shown_default, r.meaning) for r in listed if r.type != "section"]
        print_table((name, "default", "meaning"), shown)


@list_app.command("settings")
def list_settings(
    prefix: Annotated[
        str | None,
        typer.Argument(help="Only settings that begin so: optim, objectives.refalign, ..."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Every setting of recipes: type, default and meaning."""
    from alignlab.experiments.recipe_settings import named_settings

    settings = named_settings(prefix)
    if as_json:
        print_json([setting.as_json() for setting in settings])
        return
    for kind, title in TITLES.items():
        rows = [setting.row for setting in settings if setting.recipes[0] == kind]
        shown = [
            (r.name, r.type, r.shown_default, f"({r.when}) {r.meaning}" if r.when else r.meaning)
            for r in rows
        ]
        if shown:
            print_table(("setting", "type", "default", "meaning"), shown, title)


def _about(thing: object) -> str:
    return (thing.__doc__ or "").strip().split("\n", 1)[0]
