"""The order of a network's weights and maps in memory, which changes how fast it trains and not what it computes."""

import torch
from torch import nn


def lay_out(network: nn.Module, device: torch.device, precision: str) -> None:
    """Puts channels last where that trains faster: in float32 on a CPU with AVX-512 (docs/performance.md).

    On one with AVX2 alone, and in bf16, it is slower; on GPUs it was not measured. Maps follow the weights: oneDNN
    convolves with channels last if either of the two has them so.

    Args:
        network: its 4-dimensional parameters are laid out anew, in place.
        device: it will train on.
        precision: Lightning's name of the trainer's.
    """
    if device.type == "cpu" and precision == "32-true" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        network.to(memory_format=torch.channels_last)
