"""Whether the processes that train one run hold the same recipe, weights and data."""

import torch
from torch import Tensor, nn

from alignlab.recipe import recipe_hash
from alignlab.training.setup import Run


def check_replicas(run: Run) -> None:
    """Compares recipe, number of clips, digests of teachers and norms of all other weights.

    Raises:
        UserError: the processes differ.
    """
    processes = run.processes
    if processes.count == 1:
        return
    processes.check_same("the recipe", recipe_hash(run.config))
    processes.check_same("the number of clips", (len(run.clips), len(run.val_clips)))
    for alias, teacher in run.alignment.teachers.items():
        processes.check_same(f"the weights of the teacher {alias}", teacher.digest()[:12])
    networks: dict[str, nn.Module] = {
        "the transformer": run.wan.transformer,
        "the autoencoder": run.wan.vae,
        "the text encoder": run.wan.text_encoder,
        "the objectives": run.alignment,
    }
    for name, network in networks.items():
        processes.check_same(f"the weights of {name}", float(weight_norm(network)))


@torch.no_grad()
def weight_norm(network: nn.Module) -> Tensor:
    """Norm of all parameters, in fp32."""
    norms = [torch.linalg.vector_norm(p, dtype=torch.float32) for p in network.parameters()]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
