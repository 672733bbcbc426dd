"""Settings with which each objective runs on the tiny models of the tests."""

from alignlab.losses.registry import BUILT_IN

# Their own projectors are 2048 wide: too slow for a test. {stage1}: a folder with both networks.
SETTINGS: dict[str, str] = {
    "refalign": "blocks: [0, 2]",
    "repa": "blocks: [3], projector_dim: 32",
    "irepa": "blocks: [3]",
    "align4gen": "blocks: [1], projector_dim: 32, teacher: [dino, shallow]",
    "m2_repa": "blocks: [0, 2], projector_dim: 32, teacher: [dino, shallow]",
    "videorepa": "blocks: [3], projector_dim: 32",
    "sara": "blocks: [3], projector_dim: 32, aligner: '{stage1}/sara'",
    "moalign": "blocks: [3], projector_dim: 32, head: '{stage1}/moalign'",
    "crepa": "blocks: [2], projector_dim: 32",
    "layersync": "blocks: [0, 1], deep_blocks: [3, 2]",
    "sra": "blocks: [0, 1], deep_blocks: [2, 3], projector_dim: 32",
    "self_flow": "blocks: [0], deep_blocks: [3], projector_dim: 32, mask_ratio: 0.3",
    "vae_repa": "blocks: [1], projector_dim: 32",
    "dispersive": "blocks: [1]",
    "local_gram_flow": "blocks: [2], window: 3, projector_dim: 32",
    "haste_attention": "blocks: [0, 2], teacher: maps",
}


# Features of teachers that settings name besides dino; all are of one folder.
FEATURES: dict[str, str] = {"shallow": "layer:0", "maps": "attention:0-1"}


def teacher_of(name: str, settings: str, alias: str = "dino") -> str:
    """`teacher: dino, ` to stand before these settings, where the objective reads one and they name
    none."""
    needs_one = BUILT_IN[name].reads == "teacher" and "teacher:" not in settings
    return f"teacher: {alias}, " if needs_one else ""
