from itertools import pairwise

import pytest
import torch
from torch import nn

from diffusion.denoiser import Denoiser
from diffusion.errors import AntherError
from diffusion.guidance import ClassifierFree
from diffusion.networks.unet import UNet
from diffusion.rng import ImageRNG
from diffusion.samplers import DDIM, DDPM, DPMpp, Heun
from diffusion.samplers.base import Conditioned
from diffusion.schedules import Linear

T, SHAPE = 40, (3, 8, 8)
SAMPLERS = {
    "ddpm": DDPM(),
    "ddpm-10": DDPM(10, "beta"),
    "beta_prev": DDPM(variance="beta_prev"),
    "ddim": DDIM(10),
    "ddim-1": DDIM(10, 1.0, clip=True),
    "ddim-dynamic": DDIM(10, clip=0.9),
    "euler-karras": DDIM(10, grid="karras"),
    "heun": Heun(10),
    "heun-trailing": Heun(10, grid="trailing", clip=True),
    "dpmpp": DPMpp(10),
    "dpmpp-heun": DPMpp(10, correction="heun", grid="logsnr"),
    "dpmpp-sde": DPMpp(10, sde=True, clip=True),
    "dpmpp-sde-karras": DPMpp(10, sde=True, grid="karras"),
}


class Elementwise(nn.Module):
    def forward(self, x_t, t, cond=None):
        shift = 0 if cond is None else cond.view(len(cond), -1, 1, 1).sum(1, keepdim=True)
        return 0.8 * x_t + 0.1 * x_t * x_t.clamp(-2, 2) * t.to(x_t).view(-1, 1, 1, 1) + 0.05 * shift


def draw(sampler, denoiser, seeds, conds=None, hook=None):
    rng = ImageRNG(seeds)
    cond = None if conds is None else torch.stack([conds[seed] for seed in seeds])
    return sampler(denoiser, rng.randn(SHAPE), rng, cond, hook)


SEEDS = (5, 0, 17, 3, 2, 99)
SPLITS = [[[seed] for seed in SEEDS], [SEEDS[:2], SEEDS[2:]], [SEEDS[::-1]]]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("split", SPLITS, ids=["ones", "2+4", "reversed"])
def test_the_same_image_in_any_batch_split_to_the_bit(sampler, split):
    denoiser = Denoiser(Elementwise(), Linear(T))
    together = dict(zip(SEEDS, draw(sampler, denoiser, SEEDS), strict=True))
    for seeds in split:
        for seed, image in zip(seeds, draw(sampler, denoiser, seeds), strict=True):
            assert torch.equal(image, together[seed])


@pytest.mark.parametrize(
    "sampler", [DDPM(5), DDIM(5, 1.0), Heun(3), DPMpp(5, sde=True)], ids=["ddpm", "ddim-1", "heun", "dpmpp-sde"]
)
@pytest.mark.parametrize("family", ["course", "handson"])
def test_the_same_guided_image_of_a_network_in_any_batch_split(sampler, family):
    torch.manual_seed(0)
    network = UNet(T, 3, 8, (32, 32, 32), c_embed_dim=4, family=family).eval()
    denoiser = ClassifierFree(Denoiser(network, Linear(T), "v"), torch.zeros(4), 1.5)
    conds = {seed: torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS}
    together = dict(zip(SEEDS, draw(sampler, denoiser, SEEDS, conds), strict=True))
    for split in SPLITS[:2]:
        for seeds in split:
            for seed, image in zip(seeds, draw(sampler, denoiser, seeds, conds), strict=True):
                torch.testing.assert_close(image, together[seed], rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_seed_changes_its_own_image_alone(sampler):
    denoiser = Denoiser(Elementwise(), Linear(T))
    before, after = draw(sampler, denoiser, [1, 2, 3]), draw(sampler, denoiser, [1, 7, 3])
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_hook_sees_every_step(sampler):
    denoiser, steps = Denoiser(Elementwise(), Linear(T)), []
    image = draw(sampler, denoiser, SEEDS, hook=steps.append)
    n = sampler.steps or T
    assert [step.number for step in steps] == list(range(n))
    assert {step.steps for step in steps} == {n}
    assert (steps[0].t, steps[-1].s) == (1, 0)
    assert torch.equal(steps[0].x_t, ImageRNG(SEEDS).randn(SHAPE))
    assert torch.equal(steps[-1].x_s, image)
    for step, after in pairwise(steps):
        assert step.s == after.t < step.t
        assert torch.equal(step.x_s, after.x_t)
    for step in steps:
        expected = denoiser(step.x_t, torch.full((6,), step.t, dtype=torch.float64))
        if sampler.clip is True:
            expected = expected.clamp(-1, 1)
        elif sampler.clip:
            expected = Conditioned(denoiser, None, sampler.clip)(step.x_t, torch.tensor(step.t, dtype=torch.float64))
        torch.testing.assert_close(step.x_0, expected, rtol=0, atol=0)


@pytest.mark.parametrize("sampler", [Heun(4), DPMpp(6), DPMpp(6, sde=True)], ids=["heun", "dpmpp", "dpmpp-sde"])
def test_a_sampler_remembers_nothing_of_another_walk(sampler):
    # Two walks take turns on one object, as an evaluation and a callback may.
    denoiser = Denoiser(Elementwise(), Linear(T))
    alone = draw(sampler, denoiser, SEEDS)
    draw(sampler, denoiser, SEEDS[:2], hook=lambda step: draw(sampler, denoiser, [7, 8]))
    assert torch.equal(draw(sampler, denoiser, SEEDS, hook=lambda step: draw(sampler, denoiser, SEEDS[::-1])), alone)


@pytest.mark.parametrize(
    ("sampler", "calls"), [(DDIM(7), 7), (DPMpp(7), 7), (DPMpp(7, sde=True), 7), (Heun(7), 13), (Heun(1), 1)]
)
def test_calls_of_the_network(sampler, calls):
    network = Elementwise()
    seen = []
    network.register_forward_hook(lambda module, inputs, output: seen.append(float(inputs[1][0])))
    draw(sampler, Denoiser(network, Linear(T)), SEEDS)
    assert len(seen) == calls
    assert min(seen) > 0  # no network was trained at t = 0


def test_a_hook_changes_nothing_and_no_graph_is_kept():
    network = nn.Conv2d(3, 3, 1)
    forward = network.forward
    network.forward = lambda x_t, t, cond: forward(x_t)
    denoiser = Denoiser(network, Linear(T), "x0")
    watched = draw(DDPM(3), denoiser, [0, 1], hook=lambda step: None)
    assert torch.equal(watched, draw(DDPM(3), denoiser, [0, 1]))
    assert not watched.requires_grad


def test_the_condition_reaches_the_denoiser():
    denoiser = Denoiser(Elementwise(), Linear(T))
    conds = {1: torch.ones(2), 2: torch.zeros(2)}
    with_cond, without = draw(DDIM(5), denoiser, [1, 2], conds), draw(DDIM(5), denoiser, [1, 2])
    assert not torch.allclose(with_cond[0], without[0])
    assert torch.equal(with_cond[1], without[1])


def test_eta_1_is_ddpm_and_eta_0_draws_no_noise():
    denoiser = Denoiser(Elementwise(), Linear(T))
    torch.testing.assert_close(
        draw(DDIM(10, 1.0), denoiser, SEEDS), draw(DDPM(10), denoiser, SEEDS), rtol=1e-5, atol=1e-5
    )
    x_1 = ImageRNG(SEEDS).randn(SHAPE)
    images = [DDIM(10)(denoiser, x_1, ImageRNG(seeds)) for seeds in (SEEDS, range(6))]
    assert torch.equal(*images)
    images = [DDIM(10, 0.1)(denoiser, x_1, ImageRNG(seeds)) for seeds in (SEEDS, range(6))]
    assert not torch.equal(*images)


@pytest.mark.parametrize("steps", [1, 2, 7, T, 2 * T + 1])
def test_times_fall_from_one_to_zero_in_any_number_of_steps(steps):
    times = DDIM(steps).times(Linear(T))
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (1, 0)
    assert (times.diff() < 0).all()
    if steps <= T:
        torch.testing.assert_close(times * T, (times * T).round(), rtol=0, atol=1e-12)
    assert draw(DDIM(steps), Denoiser(Elementwise(), Linear(T)), [0]).isfinite().all()


def test_all_steps_by_default():
    assert len(DDPM().times(Linear(300))) == 301


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDPM(0), "1 step or more, not 0"),
        (lambda: DDIM(-3), "1 step or more, not -3"),
        (lambda: DDPM(variance="fixed_small"), "posterior, beta or beta_prev"),
        (lambda: DDIM(5, eta=1.5), r"eta lies in \[0, 1\]"),
        (lambda: DDIM(5, eta=-0.1), r"eta lies in \[0, 1\]"),
        (lambda: DPMpp(0), "1 step or more, not 0"),
        (lambda: Heun(5, grid="cosine"), "unknown grid 'cosine': .* trailing, logsnr, karras"),
        (lambda: DPMpp(5, correction="euler"), "midpoint or heun"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(AntherError, match=message):
        make()
