"""Initial weights of the Stage 1 networks, from a seed instead of global random state."""

import torch
from torch import Tensor, nn


def draw_initial_weights(module: nn.Module, seed: int) -> None:
    """Fills a module that was built on the meta device, in place, on the CPU.

    Matrices and convolution kernels: Xavier-uniform. Biases: zero. Gains of norms: one.

    Args:
        module: its parameters have names that end in `weight` or `bias`, and it has no buffers.
        seed: of the weights; global random state is neither read nor changed.
    """
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        _draw(name, parameter, generator)


@torch.no_grad()
def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if parameter.ndim > 1:
        nn.init.xavier_uniform_(parameter, generator=generator)
    elif name.endswith("bias"):
        nn.init.zeros_(parameter)
    else:
        nn.init.ones_(parameter)
