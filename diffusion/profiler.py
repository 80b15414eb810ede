"""Which operations take the time: `debug=profiler`."""

from typing import Any

from lightning.pytorch.profilers import PyTorchProfiler


class OperationProfiler(PyTorchProfiler):
    """Lightning's `PyTorchProfiler`, of operations alone and sorted by the time that each takes itself.

    Lightning can sort by the time of an operation with all that it calls alone, and names its own hooks, whole steps
    and the optimizer's step among the operations that they consist of.

    Args:
        **options: of `PyTorchProfiler`.
    """

    AVAILABLE_SORT_KEYS = {"self_cpu_time_total", "self_device_time_total"}  # noqa: RUF012 - as the base has it

    def __init__(self, **options: Any) -> None:
        super().__init__(sort_by_key="self_cpu_time_total", **options)

    def summary(self) -> str:
        """The table; shares are of the time of all operations."""
        self._delete_profilers()  # the events are there from here on
        if self.function_events:
            self.function_events[:] = [event for event in self.function_events if not event.is_user_annotation]
            # Not whether there is a GPU: the trainer may leave it alone.
            if any(event.self_device_time_total for event in self.function_events):
                self._sort_by_key = "self_device_time_total"
        return super().summary()
