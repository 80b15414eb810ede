"""How many threads work, and that those that wait for one another give their core away."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

POLICY = "OMP_WAIT_POLICY"


def wait_passively() -> None:
    """Has OpenMP's threads sleep where they would spin until the next piece of work; only before torch is imported.

    The threads of an operation wait for the slowest of them, and one whose core is busy with another process is slow by
    whole time slices, in every operation: on a shared machine the others spin most of the time
    (docs/performance.md). Who has set OMP_WAIT_POLICY keeps it.

    Reference: OpenMP 5.0, section 6.7.
    """
    os.environ.setdefault(POLICY, "passive")


@contextmanager
def as_many_as_before() -> Iterator[None]:
    """Gives torch back the number of threads that it had.

    numba, which UMAP works by, sets OpenMP's for the whole process to the number of cores, whatever OMP_NUM_THREADS
    says. The jobs of a sweep after that would draw with other threads than the first: where a process was given fewer
    cores, at several times the cost, and rounded otherwise.
    """
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
