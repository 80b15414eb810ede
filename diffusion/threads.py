"""Threads that wait for one another give their core away."""

import os

POLICY = "OMP_WAIT_POLICY"


def wait_passively() -> None:
    """Has OpenMP's threads sleep where they would spin until the next piece of work; only before torch is imported.

    The threads of an operation wait for the slowest of them, and one whose core is busy with another process is slow by
    whole time slices, in every operation: on a shared machine the others spin most of the time
    (docs/performance.md). Who has set OMP_WAIT_POLICY keeps it.

    Reference: OpenMP 5.0, section 6.7.
    """
    os.environ.setdefault(POLICY, "passive")
