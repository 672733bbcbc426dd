"""Teachers: frozen vision foundation models that turn frames or clips into patch features."""

from alignlab.teachers.load import load_teacher as load_teacher
from alignlab.teachers.load import teacher_from as teacher_from
from alignlab.teachers.registry import TEACHERS as TEACHERS
from alignlab.teachers.registry import TeacherRow as TeacherRow
from alignlab.teachers.registry import image_families as image_families
from alignlab.teachers.registry import parse_feature as parse_feature
from alignlab.teachers.teacher import Teacher as Teacher
