"""What a training reads besides its recipe: models, teachers, Stage 1 networks, clips."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from alignlab.config.parts import TeacherConfig, TrainingConfig
from alignlab.config.run import RunConfig
from alignlab.data.registry import DataConfig, dataset_files, dataset_rows
from alignlab.errors import UserError
from alignlab.losses.stage1.folder import INFO, WEIGHTS
from alignlab.models.experts import INDEX, check_index, other_part, transformer_part
from alignlab.models.model_files import on_disk, present_folder
from alignlab.models.pipeline_parts import TEXT_PARTS, part_endings
from alignlab.models.wan import pipeline_folder
from alignlab.runs.file_digests import combined, digest_files, digest_folder
from alignlab.runs.init_source import SETTING, InitSource, init_source
from alignlab.stage1.compatibility import stage1_folder_of
from alignlab.stage1.config import Stage1Config
from alignlab.teachers import TEACHERS
from alignlab.teachers.files import present_source, source_digests
from alignlab.teachers.load import teacher_folder

FROZEN_PARTS = ("vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class Input:
    """Files that make one input of a training.

    Args:
        name: as messages have it: `model/vae`, `teachers.dino`, `objectives.sara.aligner`, `data`.
        source: as the recipe names it; inputs of one name and source are the same input.
        files: digest of each file by its name in the source's folder.
        checkpoint: name of the checkpoint that `model.init_from` stands for.
    """

    name: str
    source: str
    files: dict[str, str]
    checkpoint: str | None = None

    @property
    def digest(self) -> str:
        """Of all files with their names."""
        return combined(self.files)


def read_inputs(config: TrainingConfig, *, fetch: bool) -> list[Input]:
    """Digests every file that a training reads; generated data has none.

    Of a model these are all JSON and safetensors files of its parts and the whole tokenizer, of a
    data set its metadata and all files that the metadata names, also those that are left out as
    unreadable; of another package's data set the files that it tells, and its version.

    Args:
        config: the recipe, of a run or a Stage 1 training.
        fetch: fetch models that are on the hub only, as the training will; else what is not on
            this machine is left out.

    Raises:
        UserError: with `fetch`, a model cannot be had; bad metadata; a file changes while it is
            read.
    """
    inputs: list[Input] = []
    if isinstance(config, RunConfig):
        inputs += _run_model(config, fetch=fetch)
        for alias in used_teachers(config):
            inputs += _teacher(alias, config.teachers[alias], fetch=fetch)
        inputs += _stage1(config)
        inputs += _init_from(config)
        inputs += _data(config.data)
    elif isinstance(config, Stage1Config):
        if config.text_model is not None:
            inputs += _model(config.text_model.path, TEXT_PARTS, TEXT_PARTS, fetch=fetch)
        for alias, teacher in config.teachers.items():
            inputs += _teacher(alias, teacher, fetch=fetch)
        inputs += _data(config.data)
    return inputs


def model_inputs(config: RunConfig) -> list[Input]:
    """Of `read_inputs` those of the model, as far as they are on this machine."""
    return list(_run_model(config, fetch=False))


def used_teachers(config: RunConfig) -> list[str]:
    """Those that are loaded: for objectives, and to measure with."""
    used = {alias for objective in config.objectives.values() for alias in objective.teachers}
    return [alias for alias in config.teachers if alias in used | {config.measured_against}]


def _run_model(config: RunConfig, *, fetch: bool) -> Iterator[Input]:
    model = config.model
    part = transformer_part(model.expert)
    parts: tuple[str, ...] = (part, *FROZEN_PARTS)
    if fetch:
        check_index(model.path, model.expert)
    if model.expert is not None:
        yield from _index(model.path, fetch=fetch)
        if config.eval.generates:
            parts = (*parts, other_part(model.expert))
    # random weights take the transformer's settings alone
    endings = {part: ("json",)} if model.init == "random" else {}
    yield from _model(model.path, parts, (*parts, "scheduler"), fetch=fetch, endings=endings)


def _index(path: str, *, fetch: bool) -> Iterator[Input]:
    """Where one expert hands over to the other."""
    folder = pipeline_folder(path, ()) if fetch else present_folder(path)
    if folder is not None and (folder / INDEX).is_file():
        yield Input(f"model/{INDEX}", path, digest_files(folder, {INDEX: folder / INDEX}))


def _model(
    path: str,
    parts: tuple[str, ...],
    fetched: tuple[str, ...],
    *,
    fetch: bool,
    endings: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> Iterator[Input]:
    """The parts of a pipeline.

    Args:
        path: as the recipe names it.
        parts: that are read.
        fetched: parts that are fetched, with `fetch`.
        fetch: see `read_inputs`.
        endings: of the files of a part, where fewer are read than `part_endings` has.
    """
    folder = pipeline_folder(path, fetched) if fetch else present_folder(path)
    if folder is None:
        return
    for part in parts:
        read = endings.get(part) or part_endings(part)
        yield Input(f"model/{part}", path, digest_folder(folder / part, read))


def _teacher(alias: str, teacher: TeacherConfig, *, fetch: bool) -> Iterator[Input]:
    assert teacher.path is not None  # the family's, if left out
    path = teacher.path
    folder = teacher_folder(teacher.family, path) if fetch else present_source(path)
    if folder is not None:
        if TEACHERS[teacher.family].reads == "latents":  # its encoders have to be the model's
            folder = folder / "transformer"
        yield Input(f"teachers.{alias}", path, source_digests(folder))


def _stage1(config: RunConfig) -> Iterator[Input]:
    for alias, objective in config.objectives.items():
        named = stage1_folder_of(alias, objective)
        if named is not None and (folder := on_disk(named.folder)) is not None:
            files = {name: folder / name for name in (WEIGHTS, INFO)}
            yield Input(named.key, named.folder, digest_files(folder, files))


def _init_from(config: RunConfig) -> Iterator[Input]:
    """The weights that the run starts from, if they are on this machine: none reads them later."""
    try:
        source = init_source(config)
    except UserError:
        return  # is told where a run starts from them
    if source is not None:
        assert config.model.init_from is not None
        yield init_input(config.model.init_from, source)


def init_input(named: str, source: InitSource) -> Input:
    """The weights of a checkpoint that a run starts from.

    Args:
        named: `model.init_from`.
        source: what it stands for.
    """
    digests = digest_files(source.checkpoint, source.files())
    return Input(SETTING, named, digests, source.checkpoint.name)


def _data(config: DataConfig) -> Iterator[Input]:
    """The files of the clips, and the package whose code makes clips of them."""
    found, package = dataset_files(config), dataset_rows()[config.name].package
    files = {} if found is None else digest_files(found.root, found.files)
    if package:
        files[f"package {package}"] = package
    if files:
        yield Input("data", config.name if found is None else found.source, files)
