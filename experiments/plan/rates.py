"""How fast a GPU is taken to be."""

from dataclasses import dataclass

from alignlab.config.run import RunConfig
from alignlab.plan.run_plan import VAE
from alignlab.stage1.config import Stage1Config

BF16_TFLOPS = 400.0
"""Achieved by an H100 in large bf16 products and attention, about; its peak is 989."""
FP32_SHARE = 0.2
"""Of that, in fp32 (TF32 convolutions of the autoencoder): 80 TF/s."""
TERA = 1e12
HOUR = 3600.0


def precision_of(config: RunConfig | Stage1Config) -> str:
    """Of what is trained: Stage 1 is in fp32."""
    return "fp32" if isinstance(config, Stage1Config) else config.model.precision


@dataclass(frozen=True)
class Rates:
    """Operations a second that a GPU achieves.

    Args:
        bf16: in TF/s.
    """

    bf16: float = BF16_TFLOPS

    @property
    def fp32(self) -> float:
        """In TF/s."""
        return self.bf16 * FP32_SHARE

    @property
    def assumption(self) -> str:
        """What is assumed, as text."""
        return (
            f"assumed: {self.bf16:g} TF/s achieved per GPU in bf16, {self.fp32:g} in fp32 "
            "(the autoencoder always, all with model.precision: fp32 and in Stage 1); evaluation, "
            "samples, decoding of videos and communication are not counted"
        )

    def seconds(self, precision: str, flops: dict[str, int]) -> float:
        """Time of one GPU for so many operations, by part.

        Args:
            precision: of what is trained.
            flops: by part.
        """
        is_half = precision == "bf16"
        found = 0.0
        for part, count in flops.items():
            is_fp32 = part == VAE or not is_half
            found += count / TERA / (self.fp32 if is_fp32 else self.bf16)
        return found
