"""Teachers: frozen vision foundation models that turn frames or clips into patch features."""

from alignlab.teachers import registry as _registry
from alignlab.teachers.diffusion import DiffusionTeacher as DiffusionTeacher
from alignlab.teachers.load import load_teacher as load_teacher
from alignlab.teachers.load import teacher_from as teacher_from
from alignlab.teachers.load import teacher_of_clips as teacher_of_clips
from alignlab.teachers.registry import TeacherRow as TeacherRow
from alignlab.teachers.registry import attention_families as attention_families
from alignlab.teachers.registry import attention_layers as attention_layers
from alignlab.teachers.registry import image_families as image_families
from alignlab.teachers.registry import parse_feature as parse_feature
from alignlab.teachers.teacher import Teacher as Teacher

TEACHERS: dict[str, TeacherRow]


def __getattr__(name: str) -> dict[str, TeacherRow]:
    # Not imported above: see `alignlab.teachers.registry.TEACHERS`.
    if name == "TEACHERS":
        return _registry.TEACHERS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
