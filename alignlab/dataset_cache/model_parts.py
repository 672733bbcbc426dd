"""What a frozen model's numbers depend on besides its files and its input."""

import torch

from alignlab.dataset_cache.clip_keys import libraries
from alignlab.dataset_cache.key import Part


def model_parts(model_dtype: torch.dtype, device: torch.device, *packages: str) -> dict[str, Part]:
    """Parts of a key.

    On a CPU, sums are taken in another order with another number of threads, so that it counts.

    Args:
        model_dtype: that it runs in.
        device: that it runs on; of GPUs the name counts.
        packages: whose code runs.
    """
    where = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        where = f"{torch.cuda.get_device_name(device)}, matmul {matmul}, tf32 in conv {conv}"
    return {
        "dtype": str(model_dtype).removeprefix("torch."),
        "device": where,
        "libraries": libraries("torch", *packages),
    }
