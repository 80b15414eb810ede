"""Euler, Heun and DPM-Solver++ beside diffusers' schedulers: whole walks with the same network and the same noise.

The network is asked at our times and says x_0; diffusers is asked for the steps. `exact` gives it our noise levels in
float64, `native` leaves it its own grid in float32. diffusers computes DPM-Solver++ and Euler in float32 in any case,
Heun in the type of the image.
"""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

from diffusion.denoiser import Denoiser
from diffusion.rng import ImageRNG, generator
from diffusion.samplers import DDIM, DPMpp, Heun
from diffusion.samplers.grids import noise_level
from diffusion.schedules import Linear, ScaledLinear
from tests.diffusion.samplers.test_samplers_diffusers import SEEDS, SHAPE, Network

OPTIONS = {
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "logsnr": {"use_lu_lambdas": True},
}
SCHEDULES = {"linear": Linear(1000), "scaled_linear": ScaledLinear(1000)}
GRIDS_AND_SCHEDULES = [(grid, name) for grid in OPTIONS for name in SCHEDULES]


def ours(sampler, schedule, dtype):
    rng, steps = ImageRNG(SEEDS), []
    x_1 = rng.randn(SHAPE, dtype=dtype)
    sampler(Denoiser(Network(schedule, "v"), schedule, "v"), x_1, rng, hook=steps.append)
    return steps


def x_0_at(schedule, x_t, t):
    return Denoiser(Network(schedule, "v"), schedule, "v")(x_t, torch.full((len(x_t),), t, dtype=torch.float64))


def compare(walk, theirs, tolerance):
    assert len(walk) == len(theirs)
    for step, x_s in zip(walk, theirs, strict=True):
        assert step.x_s.abs().max() < 50  # a walk that explodes would hide errors behind its scale
        scale = max(1.0, step.x_s.abs().max().item())
        torch.testing.assert_close(step.x_s, x_s.to(step.x_s), rtol=0, atol=tolerance * scale)


def levels_of(walk, schedule):
    times = torch.tensor([*(step.t for step in walk), 0], dtype=torch.float64)
    return noise_level(schedule, times)


@pytest.mark.parametrize("native", [False, True], ids=["exact", "native"])
@pytest.mark.parametrize("n", [1, 2, 10, 30])
@pytest.mark.parametrize(("grid", "name"), GRIDS_AND_SCHEDULES)
@pytest.mark.parametrize("correction", ["midpoint", "heun"])
@pytest.mark.parametrize("sde", [False, True], ids=["ode", "sde"])
def test_dpmpp(sde, correction, grid, name, n, native):
    schedule = SCHEDULES[name]
    walk = ours(DPMpp(n, sde, correction, grid=grid), schedule, torch.float32)
    scheduler = DPMSolverMultistepScheduler(
        1000,
        beta_schedule=name,
        prediction_type="sample",
        algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++",
        solver_type=correction,
        **OPTIONS[grid],
    )
    scheduler.set_timesteps(n)
    scheduler.set_begin_index(0)
    if not native:
        scheduler.sigmas = levels_of(walk, schedule)
    generators = [generator(seed) for seed in SEEDS]
    x = torch.stack([torch.randn(SHAPE, generator=g) for g in generators])
    theirs = []
    for step, index in zip(walk, scheduler.timesteps, strict=True):
        x = scheduler.step(x_0_at(schedule, x, step.t), index, x, generator=generators).prev_sample
        theirs.append(x)
    compare(walk, theirs, 1e-4 if native else 1e-5)


@pytest.mark.parametrize("native", [False, True], ids=["exact", "native"])
@pytest.mark.parametrize("n", [1, 5, 10, 30])
@pytest.mark.parametrize("grid", ["trailing", "karras"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_heun(name, grid, n, native):
    schedule = SCHEDULES[name]
    dtype = torch.float32 if native else torch.float64
    walk = ours(Heun(n, grid=grid), schedule, dtype)
    scheduler = HeunDiscreteScheduler(1000, 1e-4, 0.02, beta_schedule=name, prediction_type="sample", **OPTIONS[grid])
    scheduler.set_timesteps(n)
    scheduler.set_begin_index(0)
    levels = levels_of(walk, schedule)
    if not native:
        scheduler.sigmas = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
    # diffusers walks x / alpha
    alphas = schedule(torch.tensor([*(step.t for step in walk), 0], dtype=torch.float64))[0].to(dtype)
    y, theirs = ImageRNG(SEEDS).randn(SHAPE, dtype=dtype) / alphas[0], []
    for k, step in enumerate(walk):
        calls = [(step.t, alphas[k]), (step.s, alphas[k + 1])]
        for t, alpha in calls[: 1 if step.s == 0 else 2]:
            index = scheduler.timesteps[scheduler.step_index or 0]
            y = scheduler.step(x_0_at(schedule, alpha * y, t), index, y).prev_sample
        theirs.append(alphas[k + 1] * y)
    compare(walk, theirs, 1e-4 if native else 1e-10)


@pytest.mark.parametrize("native", [False, True], ids=["exact", "native"])
@pytest.mark.parametrize("n", [1, 2, 10, 30])
@pytest.mark.parametrize("grid", ["trailing", "karras"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_is_ddim_without_noise(name, grid, n, native):
    schedule = SCHEDULES[name]
    walk = ours(DDIM(n, grid=grid), schedule, torch.float32)
    scheduler = EulerDiscreteScheduler(1000, beta_schedule=name, prediction_type="sample", **OPTIONS[grid])
    scheduler.set_timesteps(n)
    scheduler.set_begin_index(0)
    scheduler.is_scale_input_called = True
    if not native:
        scheduler.sigmas = levels_of(walk, schedule)
    alphas = schedule(torch.tensor([*(step.t for step in walk), 0], dtype=torch.float64))[0].float()
    y, theirs = ImageRNG(SEEDS).randn(SHAPE) / alphas[0], []
    for k, (step, index) in enumerate(zip(walk, scheduler.timesteps, strict=True)):
        y = scheduler.step(x_0_at(schedule, alphas[k] * y, step.t), index, y).prev_sample
        theirs.append(alphas[k + 1] * y)
    compare(walk, theirs, 1e-4 if native else 5e-5)
