"""The settings that existed when recipes were hashed whole (version 1 of `config/identity.py`).

Frozen: a setting that is added later is in no hash of that version, and must not be listed here.
"""

FIELDS_V1: dict[str, frozenset[str]] = {
    name: frozenset(fields.split())
    for name, fields in {
        "AdamWConfig": "lr betas weight_decay grad_clip batch_size warmup schedule",
        "Align4GenConfig": ("name weight schedule gate blocks teacher normalization projector_dim"),
        "BlocksSpace": "kind choose first last max_size",
        "CategoricalSpace": "kind choices",
        "Constant": "kind",
        "CrepaConfig": (
            "name weight schedule gate blocks teacher distance tau reduction "
            "projector projector_dim"
        ),
        "EvalConfig": (
            "clips batch_size blocks teacher sample_clips generated_clips "
            "sample_steps sample_shift text_guidance reference_guidance"
        ),
        "FloatSpace": "kind low high log step",
        "FlowConfig": (
            "sampler shift logit_mean logit_std weighting text_dropout "
            "reference_dropout both_dropout"
        ),
        "FolderConfig": (
            "name path metadata frames size fps references val_fraction cache_clips on_bad_video"
        ),
        "IRepaConfig": "name weight schedule gate blocks teacher gamma",
        "IntSpace": "kind low high log step",
        "InversePowerGate": "kind p",
        "LoraConfig": "rank alpha targets",
        "MetricConfig": "name direction",
        "MoAlignConfig": (
            "name weight schedule gate blocks teacher tau head grid projector_dim impl"
        ),
        "MoAlignStage1": "val_clips kind width hidden decoder flow",
        "ModelConfig": (
            "path train lora attention gradient_checkpointing precision text_to_references"
        ),
        "NoGate": "kind",
        "OptimConfig": (
            "lr betas weight_decay grad_clip batch_size warmup schedule accumulate ema"
        ),
        "PowerGate": "kind p",
        "PrunerConfig": "name startup p reduction",
        "Ramp": "kind start end final",
        "RefAlignConfig": (
            "name weight schedule gate blocks teacher neg_weight pos_margin "
            "neg_margin negatives foreground impl"
        ),
        "RepaConfig": "name weight schedule gate blocks teacher projector_dim",
        "RunConfig": (
            "name seed steps output model data teachers objectives flow optim "
            "checkpoint eval tracking"
        ),
        "SamplerConfig": "name seed startup population",
        "SaraConfig": (
            "name weight schedule gate blocks teacher routing tau temporal_weight "
            "saliency aligner grid projector_dim impl"
        ),
        "SaraStage1": (
            "val_clips kind depth_cross depth_self heads hidden embed_dim attention "
            "background nce_weight temperature"
        ),
        "ShapesConfig": ("name frames size fps references train_clips val_clips cache_clips seed"),
        "Stage1Config": (
            "name seed steps output model data teachers stage1 optim checkpoint tracking"
        ),
        "StopAt": "kind step",
        "StopAtPlateau": "kind decay patience min_delta start",
        "SweepConfig": ("base space sampler pruner metric constraints trials seeds launch storage"),
        "TeacherConfig": "family path feature grid",
        "TextModelConfig": "path precision",
        "VideoRepaConfig": (
            "name weight schedule gate blocks teacher margin reduction first_frame "
            "pool grid projector_dim impl"
        ),
        "WindowGate": "kind low high",
    }.items()
}
"""Names of the fields by name of the config class; a class that is not here was hashed whole."""

GONE_V1: dict[str, dict[str, object]] = {
    "FolderConfig": {"cache_clips": 0},
    "ShapesConfig": {"cache_clips": 1024},
}
"""Settings of that version which there are no more, with their defaults, by name of the class.
Sweeps were hashed with them, runs without."""
