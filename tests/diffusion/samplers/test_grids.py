import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler

from diffusion.errors import AntherError
from diffusion.samplers import DPMpp
from diffusion.samplers.grids import GRIDS, karras, logsnr, noise_level, time_of, trailing
from diffusion.schedules import Cosine, Linear, ScaledLinear, Sigmoid, Straight, ZeroTerminalSNR

SCHEDULES = {
    "linear": Linear(400),
    "scaled_linear": ScaledLinear(1000),
    "cosine": Cosine(400),
    "sigmoid": Sigmoid(300),
    "zero": ZeroTerminalSNR(Cosine(400)),
    "straight": Straight(1000),
}
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@EVERY_SCHEDULE
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 50])
def test_every_grid_falls_from_one_to_zero_in_n_steps(grid, n, schedule):
    times = GRIDS[grid](schedule, n)
    assert times.dtype == torch.float64
    assert len(times) == n + 1
    assert (times[0], times[-1]) == (1, 0)
    assert (times.diff() < 0).all()
    assert torch.equal(DPMpp(n, grid=grid).times(schedule), times)


@EVERY_SCHEDULE
def test_times_and_levels_are_each_others_inverse(schedule):
    t = torch.cat([torch.linspace(1 / schedule.T, 0.98, 777), torch.tensor([1 / schedule.T])]).double()
    # A table holds its entries over 1e-4 of a step to either side.
    torch.testing.assert_close(time_of(schedule, noise_level(schedule, t)), t, rtol=0, atol=2.1e-4 / schedule.T)
    levels = noise_level(schedule, t)
    tolerance = 1e-12 if isinstance(schedule, Straight) else 3e-4
    torch.testing.assert_close(noise_level(schedule, time_of(schedule, levels)), levels, rtol=tolerance, atol=0)


def test_levels_out_of_reach():
    schedule = Linear(400)
    ends = time_of(schedule, torch.tensor([0, math.inf, 1e9], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0, 1, 1], dtype=torch.float64), rtol=0, atol=1e-15)


def spaced_levels(grid, schedule, n):
    """The levels that are said to be evenly spaced, and the n - 1 distances between them."""
    levels = noise_level(schedule, grid(schedule, n)[:-1])
    levels = levels.log() if grid is logsnr else levels ** (1 / 7)
    return levels, levels.diff()


@EVERY_SCHEDULE
@pytest.mark.parametrize("grid", [logsnr, karras])
def test_levels_are_evenly_spaced(grid, schedule):
    first = 1 if schedule.terminal_alpha else 1 - 1 / schedule.T
    ends = noise_level(schedule, torch.tensor([first, 1 / schedule.T], dtype=torch.float64))
    ends = ends.log() if grid is logsnr else ends ** (1 / 7)
    # The first distance is infinite where the walk starts from no signal.
    _, distances = spaced_levels(grid, schedule, 12)
    expected = ((ends[1] - ends[0]) / 11).expand(11)
    start = 0 if schedule.terminal_alpha else 1
    torch.testing.assert_close(distances[start:], expected[start:], rtol=2e-3, atol=0)


OPTIONS = {
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "logsnr": {"use_lu_lambdas": True},
}
BETAS = {"linear": (Linear, "linear"), "scaled_linear": (ScaledLinear, "scaled_linear")}


@pytest.mark.parametrize("n", [2, 7, 25])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("betas", BETAS)
def test_levels_are_those_of_diffusers(betas, grid, n):
    make, theirs = BETAS[betas]
    schedule = make(1000)
    scheduler = DPMSolverMultistepScheduler(1000, beta_schedule=theirs, **OPTIONS[grid])
    scheduler.set_timesteps(n)
    levels = noise_level(schedule, GRIDS[grid](schedule, n)).float()
    torch.testing.assert_close(levels, scheduler.sigmas, rtol=3e-4, atol=0)


def test_times_are_nearly_those_of_diffusers():
    # It interpolates log sigma between entries where ours interpolates alpha^2.
    scheduler = HeunDiscreteScheduler(1000, 1e-4, 0.02, use_karras_sigmas=True)
    scheduler.set_timesteps(18)
    theirs = (scheduler.timesteps[::2] + 1).double() / 1000
    torch.testing.assert_close(karras(Linear(1000), 18)[:-1], theirs, rtol=0, atol=2e-4)


def test_the_walk_starts_from_noise_where_there_is_no_signal():
    schedule = ZeroTerminalSNR(Cosine(400))
    for grid in (logsnr, karras):
        times = grid(schedule, 10)
        assert noise_level(schedule, times)[0] == math.inf
        # and loses no step on the way to the first entry with signal
        assert times[1] < 1 - 1 / 400


def test_too_short_a_schedule_is_refused():
    for schedule in (Linear(1), Straight(2)):
        assert len(trailing(schedule, 2)) == 3
        with pytest.raises(AntherError, match=f"{schedule.T} steps is too short .* sampler.grid=trailing"):
            karras(schedule, 2)


def test_steps_that_the_schedule_cannot_tell_apart_are_refused():
    with pytest.raises(AntherError, match=r"900 steps .* T = 400, .* fewer sampler.steps"):
        karras(Cosine(400), 900)
