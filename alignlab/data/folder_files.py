"""Which files a folder data set is read from.

Imports no decoder: a run's inputs are looked at before anything is loaded.
"""

from alignlab.config.data import FolderConfig
from alignlab.config.paths import user_path
from alignlab.data.metadata import read_rows
from alignlab.data.sample import DataFiles


def folder_files(config: FolderConfig) -> DataFiles | None:
    """Metadata and, of every row, video, references and folder of masks.

    Rows that are left out as unusable count: a file that is mended changes the data set.

    Returns:
        None while there is no such folder.

    Raises:
        UserError: bad metadata.
    """
    root = user_path(config.path)
    if not root.is_dir():
        return None
    source = root / config.metadata
    paths = [source]
    for row in read_rows(root, config.metadata, follow_links=config.follow_links):
        paths += [row.video, *row.references, *([] if row.masks is None else [row.masks])]
    files = {path.relative_to(root).as_posix(): path for path in paths}
    return DataFiles(str(source), root, files)
