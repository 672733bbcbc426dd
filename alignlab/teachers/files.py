"""The files that a teacher is loaded from: a folder of them, or the one of a checkpoint."""

from pathlib import Path

from alignlab.config.paths import user_path
from alignlab.errors import UserError
from alignlab.models.model_files import on_disk, present_folder
from alignlab.runs.file_digests import check_read, combined, digest_files, digest_folder
from alignlab.teachers.wheels import ENDING, WHEELS

TEACHER_FILES = ("json", "safetensors")
"""Endings of the files of a folder that a teacher is loaded from."""
CHECKPOINT_ENDINGS = (".pt", ".pth", ENDING)
"""Of files that `torch.save` wrote, in which models come from their authors, and of wheels."""


def is_checkpoint(path: str) -> bool:
    """Whether a recipe's path names the file of a checkpoint, and no folder or hub id."""
    return path.endswith(CHECKPOINT_ENDINGS) and not user_path(path).is_dir()


def setting_of(family: str) -> str:
    """The setting that names a teacher's files, for messages."""
    return f"teachers ({family}) path"


def checkpoint_file(path: str, family: str) -> Path:
    """The file of that name.

    Raises:
        UserError: there is none.
    """
    file = user_path(path)
    if file.is_file():
        return file
    fix = "checkpoints are not fetched by themselves"
    if family in WHEELS:
        fix = WHEELS[family].fix
    raise UserError(f"{setting_of(family)}: {path}: no such file; {fix}")


def check_no_checkpoint(path: str, family: str) -> None:
    """Refuses a folder that has a checkpoint and no model of transformers.

    Of the families that are read from wheels, it is the wheel of this one that is named.

    Raises:
        UserError: it names the file to take.
    """
    folder = on_disk(path)
    if folder is None or (folder / "config.json").exists():
        return
    files = sorted(file for file in folder.iterdir() if file.suffix in CHECKPOINT_ENDINGS)
    if family in WHEELS:
        known = WHEELS[family]
        names = (known.wheel, Path(known.member).name)
        files = [file for file in files if file.name in names]
    else:
        files = [file for file in files if file.suffix != ENDING]
    if files:
        raise UserError(
            f"{setting_of(family)}: {path} has no config.json; to load the checkpoint in it, name "
            f"the file: {files[0]}"
        )


def present_source(path: str) -> Path | None:
    """The folder or the file of a teacher if it is on this machine; never uses the network."""
    if is_checkpoint(path):
        file = user_path(path)
        return file if file.is_file() else None
    return present_folder(path)


def source_digests(source: Path) -> dict[str, str]:
    """SHA-256 of the files that are read of a folder or of a checkpoint, by their names."""
    if source.is_file():
        return digest_files(source.parent, {source.name: source})
    return digest_folder(source, TEACHER_FILES)


def source_digest(source: Path) -> str:
    """One digest of `source_digests`.

    Raises:
        UserError: there are no such files, or one of them cannot be read.
    """
    digests = source_digests(source)
    if not digests:
        raise UserError(f"{source} has none of the files that it is read from: restore them")
    check_read(source.parent if source.is_file() else source, digests)
    return combined(digests)


def check_source_unchanged(source: Path, digest: object) -> None:
    """Refuses files that were loaded from after they were hashed, and had changed in between.

    Raises:
        UserError: their digest is another one now.
    """
    if source_digest(source) != digest:
        raise UserError(
            f"{source} has changed since it was hashed: what was cached is of other files, start "
            "again"
        )
