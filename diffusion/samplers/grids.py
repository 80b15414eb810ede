"""Times at which a walk stops: (schedule, n) -> n + 1 falling times from 1 to 0, float64.

Log-SNR and Karras spacing are rules for the noise level sigma_t / alpha_t. They space n levels from that of t = 1 to
that of t = 1 / T, where training ended at either side, and the last step goes from there to t = 0. On a schedule with
no signal at t = 1 the noise level is infinite there: then the rule starts from the level of t = 1 - 1 / T, and the walk
still from t = 1.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffusion.errors import AntherError
from diffusion.schedules import Schedule

Grid = Callable[[Schedule, int], Tensor]


def trailing(schedule: Schedule, n: int) -> Tensor:
    """Equal steps in t, on the entries k / T where T is fine enough.

    Starts at t = 1, where training ended, whatever the number of steps (Lin et al., 2024, arXiv 2305.08891).
    """
    T = schedule.T
    # Multiplied before it is divided: halves stay halves, and all machines round them alike.
    entries = torch.arange(n, -1, -1, dtype=torch.float64) * T / n
    return (entries.round() if n <= T else entries) / T


def logsnr(schedule: Schedule, n: int) -> Tensor:
    """Equal steps in log(alpha_t / sigma_t) (Lu et al., 2022, arXiv 2206.00927)."""
    return _spaced(schedule, n, torch.exp, torch.log)


def karras(schedule: Schedule, n: int, rho: float = 7.0) -> Tensor:
    """Equal steps in (sigma_t / alpha_t)^(1 / rho) (Karras et al., 2022, arXiv 2206.00364, equation 5)."""
    return _spaced(schedule, n, lambda ramp: ramp**rho, lambda level: level ** (1 / rho))


GRIDS: Mapping[str, Grid] = {"trailing": trailing, "logsnr": logsnr, "karras": karras}


def noise_level(schedule: Schedule, t: Tensor) -> Tensor:
    """sigma_t / alpha_t, float64: 0 at t = 0, rising in t, infinite where there is no signal."""
    alpha, sigma = schedule(t)
    return sigma / alpha


def time_of(schedule: Schedule, level: Tensor) -> Tensor:
    """The earliest times in [0, 1] at which sigma_t / alpha_t reaches the levels; the inverse of `noise_level`.

    By bisection, so any schedule will do whose levels rise in t.

    Args:
        schedule: any.
        level: float64, not negative, any shape; what t = 1 does not reach is put there.
    """
    low, high = torch.zeros_like(level), torch.ones_like(level)
    for _ in range(60):
        middle = (low + high) / 2
        below = noise_level(schedule, middle) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


def beginning_at(times: Tensor, start: float) -> Tensor:
    """The end of a walk: `start`, and the stops below it.

    A first step shorter than half of the grid's own passes over its stop: a solver with a memory divides by its length.

    Args:
        times: of the whole walk, falling from 1 to 0.
        start: in [0, 1]; 1 is the whole walk, 0 the image without a step.
    """
    left = times[times < start]
    if len(left) > 1 and start - left[0] < (times[-len(left) - 1] - left[0]) / 2:
        left = left[1:]
    return torch.cat([times.new_tensor([start]), left])


def _spaced(
    schedule: Schedule, n: int, to_level: Callable[[Tensor], Tensor], from_level: Callable[[Tensor], Tensor]
) -> Tensor:
    ends = torch.tensor([1.0, 1 / schedule.T], dtype=torch.float64)
    if schedule.terminal_alpha == 0:
        ends[0] -= 1 / schedule.T
    if not ends[0] > ends[1]:
        raise AntherError(
            f"a schedule of {schedule.T} steps is too short for this sampler.grid: choose sampler.grid=trailing."
        )
    first, last = from_level(noise_level(schedule, ends))
    ramp = first + torch.linspace(0, 1, n, dtype=torch.float64) * (last - first)
    times = torch.cat([time_of(schedule, to_level(ramp)), torch.zeros(1, dtype=torch.float64)])
    # The ends are known exactly.
    times[n - 1] = 1 / schedule.T
    times[0] = 1
    if not bool((noise_level(schedule, times).diff() < 0).all()):
        raise AntherError(
            f"{n} steps are too many for this sampler.grid on this schedule of T = {schedule.T}, some would fall on "
            "one time: take fewer sampler.steps, or sampler.grid=trailing."
        )
    return times
