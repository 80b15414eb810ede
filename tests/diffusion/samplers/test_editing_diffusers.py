"""Image-to-image beside diffusers: where the walk begins, and what it makes of the image.

`StableDiffusionImg2ImgPipeline` needs transformers, so its rule (`get_timesteps`, diffusers 0.42) is written out here:
of n steps it takes the last int(n strength), from the image that the scheduler noised. Ours begins at the strength
itself, so the two are one where the strength is a stop of the grid; elsewhere theirs begins at the stop below.
"""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from diffusion.denoiser import Denoiser
from diffusion.editing import Edit
from diffusion.rng import ImageRNG, generator
from diffusion.samplers import DDIM, DPMpp
from diffusion.samplers.grids import beginning_at, noise_level, trailing
from diffusion.schedules import Linear
from tests.diffusion.samplers.test_samplers_diffusers import SEEDS, SHAPE, Network, exactly

T = 1000
SCHEDULE = Linear(T)


def kept(scheduler, steps, strength):
    """The times that diffusers goes through, and how many steps it leaves out."""
    left_out = max(steps - min(int(steps * strength), steps), 0)
    return scheduler.timesteps[left_out * scheduler.order :], left_out


@pytest.mark.parametrize("steps", [8, 25, 50, T])
@pytest.mark.parametrize("strength", [0.04, 0.3, 0.5, 0.6003, 0.75, 0.999, 1.0])
def test_the_stops_are_those_of_diffusers(strength, steps):
    scheduler = DDIMScheduler(T, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    theirs = kept(scheduler, steps, strength)[0].tolist()
    ours = ((beginning_at(trailing(SCHEDULE, steps), strength)[:-1] * T).round().long() - 1).tolist()
    if steps * strength == int(steps * strength):
        assert ours == theirs
    elif steps < T:
        # The first stop below may be passed over, see `beginning_at`.
        assert ours[0] == round(strength * T) - 1
        assert ours[1:] in (theirs, theirs[1:])


@pytest.mark.parametrize(("steps", "strength"), [(8, 0.5), (8, 0.125), (50, 0.5), (25, 0.2), (T, 0.25), (8, 1.0)])
@pytest.mark.parametrize("kind", ["ddim", "ddim-1", "dpmpp", "dpmpp-sde"])
def test_a_walk_from_an_image_is_that_of_diffusers(kind, steps, strength):
    dtype = torch.float32 if "dpmpp" in kind else torch.float64  # diffusers computes DPM-Solver++ in float32
    image = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4), dtype=dtype)
    options = {"prediction_type": "sample", "timestep_spacing": "trailing"}
    denoiser = Denoiser(Network(SCHEDULE, "v"), SCHEDULE, "v")
    if "dpmpp" in kind:
        sde = kind == "dpmpp-sde"
        sampler, extra = DPMpp(steps, sde), {}
        algorithm = "sde-dpmsolver++" if sde else "dpmsolver++"
        scheduler = DPMSolverMultistepScheduler(T, 1e-4, 0.02, algorithm_type=algorithm, **options)
    else:
        eta = float(kind == "ddim-1")
        sampler, extra = DDIM(steps, eta), {"eta": eta}
        scheduler = DDIMScheduler(T, clip_sample=False, **options)
    scheduler = exactly(scheduler, SCHEDULE)
    scheduler.set_timesteps(steps)
    timesteps, left_out = kept(scheduler, steps, strength)
    if "dpmpp" in kind:
        scheduler.sigmas = noise_level(SCHEDULE, trailing(SCHEDULE, steps))
        scheduler.set_begin_index(left_out)
    generators = [generator(seed) for seed in SEEDS]
    noise = torch.stack([torch.randn(SHAPE, generator=g, dtype=dtype) for g in generators])
    # At strength 1 diffusers noises the image to its last time, too; ours starts from noise alone.
    x = noise if strength == 1 else scheduler.add_noise(image.expand(3, *SHAPE), noise, timesteps[:1].expand(3))
    for index in timesteps:
        x_0 = denoiser(x, ((index + 1).double() / T).expand(len(x)))
        x = scheduler.step(x_0, index, x, generator=generators, **extra).prev_sample

    rng = ImageRNG(SEEDS)
    begun, start, project = Edit(image, strength).begin(SCHEDULE, rng.randn(SHAPE, dtype=dtype))
    ours = sampler(denoiser, begun, rng, start=start, project=project)
    assert ours.abs().max() < 50
    tolerance = (1e-5 if dtype == torch.float32 else 1e-10) * max(1, x.abs().max().item())
    torch.testing.assert_close(ours, x.to(dtype), rtol=0, atol=tolerance)
