"""What a frozen model's numbers depend on besides its files and its input."""

import torch

from alignlab.dataset_cache.clip_keys import libraries
from alignlab.dataset_cache.key import Part


def model_parts(model_dtype: torch.dtype, device: torch.device, *packages: str) -> dict[str, Part]:
    """Parts of a key.

    On a CPU, sums are taken in another order with another number of threads or other vector
    instructions, so that both count. On a GPU CUDA and cuDNN do, which the name of the package
    torch does not tell.

    Args:
        model_dtype: that it runs in.
        device: that it runs on; of GPUs the name counts.
        packages: whose code runs.
    """
    return {
        "dtype": str(model_dtype).removeprefix("torch."),
        "libraries": libraries("torch", *packages),
        **(_gpu_parts(device) if device.type == "cuda" else _cpu_parts()),
    }


def _cpu_parts() -> dict[str, Part]:
    return {
        "device": f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }


def _gpu_parts(device: torch.device) -> dict[str, Part]:
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    return {
        "device": f"{torch.cuda.get_device_name(device)}, matmul {matmul}, tf32 in conv {conv}",
        "build": f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}",
    }
