"""From the host to the device, without waiting for it."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor.to(device, dtype)`, which on CUDA does not wait for the work that was queued before.

    CUDA has read a tensor of ordinary memory when the call returns, so the tensor may be gone at once; other
    accelerators do not promise that, and there the copy is a plain one.

    Args:
        tensor: on the host, or on the device already.
        device: where it is wanted.
        dtype: None keeps the tensor's own.
    """
    return tensor.to(device, dtype or tensor.dtype, non_blocking=device.type == "cuda")
