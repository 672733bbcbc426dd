"""A family of teachers of another package: DINOv2 under another normalisation of pixels."""

from alignlab.teachers.registry import TeacherRow

HALF_DINO = TeacherRow(
    {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"},
    path="assets/tiny-dino",
    feature="pre_norm",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    resize="bilinear",
)
