"""Which operations take the time: `debug=profiler`."""

from typing import Any

import torch
from lightning.pytorch.profilers import PyTorchProfiler


class OperationProfiler(PyTorchProfiler):
    """Lightning's `PyTorchProfiler`, sorted by the time that an operation takes itself.

    Lightning can sort by the time of an operation with all that it calls alone, and then names its own hooks.

    Args:
        **options: of `PyTorchProfiler`.
    """

    AVAILABLE_SORT_KEYS = {"self_cpu_time_total", "self_device_time_total"}  # noqa: RUF012 - as the base has it

    def __init__(self, **options: Any) -> None:
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        super().__init__(sort_by_key=key, **options)
