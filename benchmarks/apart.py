"""Seconds of work, and a process beside the benchmark's own for peers that would gain from what ours sets for one."""

import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from threadpoolctl import threadpool_limits


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(call: Callable[..., Any], *arguments: Any, device: str = "cpu") -> tuple[float, Any]:
    """Seconds, and what the call returned.

    Args:
        call: works on `device`.
        *arguments: of `call`.
        device: on a CPU seconds are the processor's, since it is shared; on a GPU the clock's, until it is done.
    """
    before = _now(device)
    result = call(*arguments)
    return _now(device) - before, result


def _now(device: str) -> float:
    if device == "cpu":
        return cpu_seconds()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


class Apart:
    """Objects in a process of their own, with one thread, and glibc's allocator as it comes unless `make` sets it.

    That process waits while this one works, so turns interleave as they would in one.

    Args:
        make: makes the objects by name, there.
        *arguments: of `make`.
        device: see `timed`.
    """

    def __init__(self, make: Callable[..., dict[str, Any]], *arguments: Any, device: str = "cpu") -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments, device))
        self._process.start()
        theirs.close()

    def timed(self, name: str, method: str, *arguments: Any) -> tuple[float, Any]:
        """Seconds there, and what the method of the object of that name returned."""
        self._pipe.send((name, method, arguments))
        return self._pipe.recv()  # type: ignore[no-any-return]

    def end(self) -> None:
        """Ends the process."""
        self._pipe.send(None)
        self._process.join()


def _serve(pipe: Any, make: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], device: str) -> None:
    # A spawned process would spawn the workers of its loaders too, which import everything anew.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(1)
    threadpool_limits(1)
    objects = make(*arguments)
    while (asked := pipe.recv()) is not None:
        name, method, rest = asked
        pipe.send(timed(getattr(objects[name], method), *rest, device=device))
