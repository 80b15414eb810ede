"""Whole walks beside diffusers' schedulers, with the same network and the same noise.

`exact` gives diffusers our float64 table, so the arithmetic of the steps is compared to 1e-10; `native` leaves it its
own float32 table and images: DDIM stays within 1e-5 of the largest value, DDPM within 2e-4, because diffusers gets beta
as 1 - a / b in float32 and beta starts at 1e-4. `test_ddpm_float32_images` shows that
the table alone is to blame: with a float64 one diffusers walks float32 images to within 1e-5 of ours. Noise is the same
because diffusers is given our per-image generators. Habits of diffusers are stepped around and named where it happens.
"""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from diffusion.denoiser import Denoiser
from diffusion.errors import AntherError
from diffusion.rng import ImageRNG, generator
from diffusion.samplers import DDIM, DDPM
from diffusion.samplers.base import Conditioned
from diffusion.schedules import Cosine, Linear, ScaledLinear, Straight, ZeroTerminalSNR

SEEDS, SHAPE = (3, 11, 5), (2, 4, 4)
PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


class Network(nn.Module):
    """Elementwise and nonlinear; near enough to a denoiser of unit normal data that no walk explodes."""

    def __init__(self, schedule, target):
        super().__init__()
        self.schedule, self.target = schedule, target

    def forward(self, x_t, t, cond=None):
        alpha, sigma = (level.to(x_t).view(-1, 1, 1, 1) for level in self.schedule(t))
        best = {"eps": sigma * x_t, "x0": alpha * x_t, "v": 0 * x_t}[self.target]
        bump = alpha if self.target == "eps" else 1
        return best + 0.3 * bump * torch.tanh(1.5 * x_t + 4 * t.to(x_t).view(-1, 1, 1, 1) - 2)


def ours(sampler, schedule, target, dtype):
    """x_0 and every x_s of the walk."""
    rng, steps = ImageRNG(SEEDS), []
    x_1 = rng.randn(SHAPE, dtype=dtype)
    denoiser = Denoiser(Network(schedule, target), schedule, target)
    sampler(denoiser, x_1, rng, hook=steps.append)
    return steps


def theirs(scheduler, schedule, target, dtype, steps, **options):
    generators = [generator(seed) for seed in SEEDS]
    x = torch.stack([torch.randn(SHAPE, generator=g, dtype=dtype) for g in generators])
    scheduler.set_timesteps(steps)
    network, walk = Network(schedule, target), []
    for index in scheduler.timesteps:
        t = ((index + 1).double() / schedule.T).expand(len(x))
        x = scheduler.step(network(x, t), index, x, generator=generators, **options)
        walk.append(x)
        x = x.prev_sample
    return walk


def exactly(scheduler, schedule):
    scheduler.alphas_cumprod = schedule.alpha_bar[1:].clone()
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def compare(walk, reference, tolerance, last=True):
    assert len(walk) == len(reference)
    for step, expected in zip(walk, reference, strict=True):
        scale = max(1.0, step.x_s.abs().max().item(), step.x_0.abs().max().item())
        assert scale < 50  # a walk that explodes would hide errors behind its scale
        torch.testing.assert_close(step.x_0, expected.pred_original_sample, rtol=0, atol=tolerance * scale)
        if last or step.number < step.steps - 1:
            torch.testing.assert_close(step.x_s, expected.prev_sample, rtol=0, atol=tolerance * scale)


SCHEDULES = {
    "linear": (Linear, {"beta_schedule": "linear"}),
    "scaled_linear": (ScaledLinear, {"beta_schedule": "scaled_linear"}),
    "cosine": (Cosine, {"beta_schedule": "squaredcos_cap_v2"}),
    "zero": (lambda T: ZeroTerminalSNR(Linear(T)), {"beta_schedule": "linear", "rescale_betas_zero_snr": True}),
}
# All but eps without signal at t = 1, which is refused.
PAIRS = [(name, target) for name in SCHEDULES for target in PREDICTION if (name, target) != ("zero", "eps")]


@pytest.mark.parametrize(("T", "steps"), [(100, 100), (400, 25), (400, 30), (1000, 7), (1000, 1), (300, 299)])
@pytest.mark.parametrize("target", PREDICTION)
@pytest.mark.parametrize(("variance", "theirs_is"), [("posterior", "fixed_small"), ("beta", "fixed_large")])
def test_ddpm_exact(variance, theirs_is, target, T, steps):
    schedule = Linear(T)
    scheduler = DDPMScheduler(
        T, variance_type=theirs_is, prediction_type=PREDICTION[target], clip_sample=False, timestep_spacing="trailing"
    )
    walk = ours(DDPM(steps, variance), schedule, target, torch.float64)
    reference = theirs(exactly(scheduler, schedule), schedule, target, torch.float64, steps)
    # When the last of fewer steps does not start at entry 1, diffusers adds noise to the finished image: with
    # fixed_small 1e-10 of it, with fixed_large all of beta. The last x_0 is compared instead, and ours is x_0.
    compare(walk, reference, 1e-10, last=steps == T)
    torch.testing.assert_close(walk[-1].x_s, walk[-1].x_0, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_ddpm_native(target, name):
    make, options = SCHEDULES[name]
    scheduler = DDPMScheduler(400, prediction_type=PREDICTION[target], clip_sample=False, **options)
    schedule = make(400)
    walk = ours(DDPM(), schedule, target, torch.float32)
    reference = theirs(scheduler, schedule, target, torch.float32, 400)
    compare(walk, reference, 2e-4)


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_ddpm_float32_images(target, name):
    make, options = SCHEDULES[name]
    schedule = make(400)
    scheduler = exactly(DDPMScheduler(400, prediction_type=PREDICTION[target], clip_sample=False, **options), schedule)
    walk = ours(DDPM(), schedule, target, torch.float32)
    compare(walk, theirs(scheduler, schedule, target, torch.float32, 400), 1e-5)


def usable(eta, name):
    # From alpha_t = 0 with eta = 1 the weight of eps is 0; diffusers takes the root of -1e-17 there and returns nan.
    return 0.99 if name == "zero" and eta == 1 else eta


@pytest.mark.parametrize(("name", "target"), PAIRS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("T", "steps"), [(400, 50), (1000, 10), (100, 100), (300, 1)])
def test_ddim_exact(T, steps, eta, target, name):
    # Only step counts that divide T: for others diffusers' DDIM walks to t - T // steps and then goes on from
    # another time, which is not a walk; ours takes the times of diffusers' DDPM (compared above with 30 of 400).
    make, options = SCHEDULES[name]
    eta = usable(eta, name)
    schedule = make(T)
    scheduler = DDIMScheduler(
        T, prediction_type=PREDICTION[target], clip_sample=False, timestep_spacing="trailing", **options
    )
    walk = ours(DDIM(steps, eta), schedule, target, torch.float64)
    reference = theirs(exactly(scheduler, schedule), schedule, target, torch.float64, steps, eta=eta)
    compare(walk, reference, 1e-10)


@pytest.mark.parametrize(("name", "target"), PAIRS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_native(eta, target, name):
    make, options = SCHEDULES[name]
    eta = usable(eta, name)
    scheduler = DDIMScheduler(
        400, prediction_type=PREDICTION[target], clip_sample=False, timestep_spacing="trailing", **options
    )
    schedule = make(400)
    walk = ours(DDIM(50, eta), schedule, target, torch.float32)
    compare(walk, theirs(scheduler, schedule, target, torch.float32, 50, eta=eta), 1e-5)


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(50), DDIM(50, 1.0)], ids=["ddpm", "ddim", "ddim-1"])
@pytest.mark.parametrize("name", ["linear", "zero"])
def test_float32_images_walk_with_float64_ones(sampler, name):
    schedule, noise = SCHEDULES[name][0](400), torch.randn(50 * 400, generator=torch.Generator().manual_seed(0))

    class Replay:
        def __init__(self):
            self.at = 0

        def randn(self, shape, device, dtype):
            self.at += 1
            return noise[self.at : self.at + 96].view(3, *shape).to(dtype)

    walks = []
    for dtype in (torch.float32, torch.float64):
        x_1 = noise[:96].view(3, *SHAPE).to(dtype)
        walks.append(sampler(Denoiser(Network(schedule, "v"), schedule, "v"), x_1, Replay()))
    assert walks[0].dtype == torch.float32
    torch.testing.assert_close(walks[0].double(), walks[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", [DDPM, DDIM])
def test_clipping_is_that_of_diffusers(sampler):
    schedule = Linear(100)
    options = {"clip_sample": True, "timestep_spacing": "trailing"}
    if sampler is DDPM:
        walk = ours(DDPM(clip=True), schedule, "eps", torch.float64)
        reference = theirs(exactly(DDPMScheduler(100, **options), schedule), schedule, "eps", torch.float64, 100)
    else:
        # diffusers keeps the unclipped eps unless it is told to derive it from the clipped x_0; ours always does.
        walk = ours(DDIM(20, clip=True), schedule, "eps", torch.float64)
        scheduler = exactly(DDIMScheduler(100, **options), schedule)
        reference = theirs(scheduler, schedule, "eps", torch.float64, 20, use_clipped_model_output=True)
    assert any((step.x_0.abs() == 1).any() for step in walk)
    compare(walk, reference, 1e-10)


@pytest.mark.parametrize("share", [0.9, 0.995])
def test_dynamic_thresholding_is_that_of_diffusers(share):
    schedule = Linear(100)
    options = {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": share, "sample_max_value": 1e9}
    scheduler = exactly(DDPMScheduler(100, timestep_spacing="trailing", **options), schedule)
    walk = ours(DDPM(clip=share), schedule, "eps", torch.float64)
    compare(walk, theirs(scheduler, schedule, "eps", torch.float64, 100), 1e-10)
    plain = ours(DDPM(clip=True), schedule, "eps", torch.float64)
    assert not torch.allclose(walk[-1].x_s, plain[-1].x_s, atol=1e-3)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.995, 0.9999])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_threshold_is_that_of_diffusers_for_each_image(share, autocast):
    rng = torch.Generator().manual_seed(0)
    x_0 = torch.randn(5, 3, 8, 8, generator=rng) * torch.tensor([0.1, 0.5, 1.0, 3.0, 40.0]).view(-1, 1, 1, 1)
    options = {"thresholding": True, "dynamic_thresholding_ratio": share, "sample_max_value": 1e9}
    denoiser = Denoiser(Network(Linear(100), "x0"), Linear(100), "x0")
    denoiser.network.forward = lambda x_t, *_: x_t
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine = Conditioned(denoiser, None, share)(x_0, torch.ones(()))
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, DDPMScheduler(100, **options)._threshold_sample(x_0), rtol=1e-6, atol=1e-6)
    assert mine.abs().amax((1, 2, 3)).max() <= 1
    for k in range(5):
        assert torch.equal(Conditioned(denoiser, None, share)(x_0[k : k + 1], torch.ones(()))[0], mine[k])


def test_an_image_within_its_range_is_not_thresholded():
    x_0 = torch.tensor([0.3, -0.9, 1.0, 0.1]).view(1, 1, 2, 2)
    denoiser = Denoiser(Network(Linear(100), "x0"), Linear(100), "x0")
    denoiser.network.forward = lambda *_: x_0
    assert torch.equal(Conditioned(denoiser, None, 0.995)(x_0, torch.ones(())), x_0)


@pytest.mark.parametrize("clip", [0, 1, 1.0, -0.5, 99.5])
def test_a_share_lies_between_0_and_1(clip):
    with pytest.raises(AntherError, match=r"sampler\.clip"):
        DDIM(clip=clip)


@pytest.mark.parametrize("steps", [1, 3, 10, 1000])
def test_straight_paths_are_eulers_method_of_diffusers(steps):
    class Flow(nn.Module):
        def forward(self, x_t, t, cond=None):
            return torch.tanh(x_t + t.to(x_t).view(-1, 1, 1, 1)) - 0.2 * x_t

    network = Flow()
    rng = ImageRNG(SEEDS)
    x = x_1 = rng.randn(SHAPE)
    image = DDIM(steps)(Denoiser(network, Straight(1000), "flow"), x_1, rng)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(sigmas=[(steps - k) / steps if steps != 3 else [1, 0.667, 0.333][k] for k in range(steps)])
    for index in scheduler.timesteps:
        x = scheduler.step(network(x, (index / 1000).expand(len(x))), index, x).prev_sample
    torch.testing.assert_close(image, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("T", "steps"), [(400, 25), (400, 30), (1000, 16), (300, 9), (300, 200), (1000, 1000), (7, 1)])
def test_times_are_the_trailing_ones_of_diffusers(T, steps):
    scheduler = DDPMScheduler(T, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    times = DDPM(steps).times(Linear(T))
    assert times.dtype == torch.float64
    assert ((times[:-1] * T).round().long() - 1).tolist() == scheduler.timesteps.tolist()
    assert times[-1] == 0
