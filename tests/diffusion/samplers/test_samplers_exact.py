"""Samplers on denoisers that are known in closed form, so that the answer is known too."""

import math
from itertools import pairwise

import pytest
import torch

from diffusion.rng import ImageRNG
from diffusion.samplers import DDIM, DDPM, DPMpp, Heun
from diffusion.schedules import Cosine, Linear, Straight, ZeroTerminalSNR

PIXELS = (1, 100, 200)
N = math.prod(PIXELS)


class Gaussian:
    """E[x_0 | x_t] when every pixel is drawn from N(mean, std^2)."""

    def __init__(self, schedule, mean, std):
        self.schedule, self.mean, self.std = schedule, mean, std

    def __call__(self, x_t, t, cond=None):
        alpha, sigma = (level.view(-1, 1, 1, 1) for level in self.schedule(t))
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x_t - alpha * self.mean)

    def along_the_ode(self, x_1, t=0.0):
        """The exact map of the probability flow from t = 1 to t: it keeps the quantile."""
        (alpha, sigma), (alpha_t, sigma_t) = (
            self.schedule(torch.ones(())),
            self.schedule(torch.tensor(t, dtype=torch.float64)),
        )
        quantile = (x_1 - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2).sqrt()
        return alpha_t * self.mean + quantile * (alpha_t**2 * self.std**2 + sigma_t**2).sqrt()


class Points:
    """E[x_0 | x_t] when x_0 is one of k images with given chances: the exact posterior of a finite data set."""

    def __init__(self, schedule, points, chances):
        self.schedule, self.points, self.chances = schedule, points, chances

    def __call__(self, x_t, t, cond=None):
        alpha, sigma = (level.view(-1, 1) for level in self.schedule(t))
        distance = ((x_t[:, None] - alpha.view(-1, 1, 1, 1, 1) * self.points) ** 2).flatten(2).sum(2)
        posterior = (self.chances.log() - distance / (2 * sigma**2)).softmax(1)
        return torch.einsum("bk,kchw->bchw", posterior, self.points)


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.5), (-0.5, 0.1), (0.0, 2.0)])
@pytest.mark.parametrize(
    "schedule", [Straight(1600), Cosine(1600), ZeroTerminalSNR(Linear(1600))], ids=["straight", "cosine", "zero"]
)
def test_ddim_reaches_the_exact_map_with_order_one(schedule, mean, std):
    denoiser = Gaussian(schedule, mean, std)
    x_1 = ImageRNG([0]).randn((1, 20, 20), dtype=torch.float64)
    exact = denoiser.along_the_ode(x_1)
    errors = [(DDIM(n)(denoiser, x_1, ImageRNG([0])) - exact).abs().max().item() for n in (50, 100, 200, 400)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] < 0.02 * max(std, 1)
    assert all(0.8 < order < 1.3 for order in orders)


def orders(errors):
    return [math.log2(a / b) for a, b in pairwise(errors)]


SECOND_ORDER = {
    "heun": lambda n, grid: Heun(n, grid=grid),
    "midpoint": lambda n, grid: DPMpp(n, grid=grid),
    "linear": lambda n, grid: DPMpp(n, correction="heun", grid=grid),
}


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.5), (-0.5, 0.2)])
@pytest.mark.parametrize(
    "schedule", [Straight(1600), Linear(1000), ZeroTerminalSNR(Linear(1600))], ids=["straight", "linear", "zero"]
)
@pytest.mark.parametrize("grid", ["logsnr", "karras"])
@pytest.mark.parametrize("make", SECOND_ORDER.values(), ids=SECOND_ORDER)
def test_half_the_step_leaves_a_quarter_of_the_error(make, grid, schedule, mean, std):
    # Up to t = 1 / T, the last time before 0: all walks of these grids end with the same step from there.
    denoiser = Gaussian(schedule, mean, std)
    x_1 = ImageRNG([0]).randn((1, 20, 20), dtype=torch.float64)
    errors = []
    for n in (80, 160, 320):
        steps = []
        make(n, grid)(denoiser, x_1, ImageRNG([0]), hook=steps.append)
        assert steps[-1].t == 1 / schedule.T
        errors.append((steps[-1].x_t - denoiser.along_the_ode(x_1, steps[-1].t)).abs().max().item())
    assert errors[-1] < 0.01
    assert all(1.85 < order < 2.35 for order in orders(errors))


@pytest.mark.parametrize("make", SECOND_ORDER.values(), ids=SECOND_ORDER)
def test_straight_paths_in_equal_steps_are_walked_with_order_two(make):
    # From no signal at all to t = 0: the two ends cost a logarithm of the order, not the order.
    denoiser = Gaussian(Straight(1600), 0.3, 0.5)
    x_1 = ImageRNG([0]).randn((1, 20, 20), dtype=torch.float64)
    exact = denoiser.along_the_ode(x_1)
    errors = [
        (make(n, "trailing")(denoiser, x_1, ImageRNG([0])) - exact).abs().max().item() for n in (100, 200, 400, 800)
    ]
    assert errors[-1] < 1e-4
    assert all(1.7 < order < 2.1 for order in orders(errors))


class UnitDraws:
    """Row 0 is given no noise, row k the k-th draw as 1 and the others as 0; the first image counts as a draw."""

    def __init__(self, rows):
        self.rows, self.at = rows, 1

    def randn(self, shape, device, dtype):
        self.at += 1
        draws = torch.zeros(self.rows, *shape, dtype=dtype)
        draws[self.at] = 1
        return draws


def variance_error(sampler, schedule, mean, std):
    """Relative error of the variance at the last time before 0, without sampling error.

    On a Gaussian denoiser a walk is affine in its draws, and one walk with unit draws tells all coefficients.
    """
    n = sampler.steps
    alpha_1, sigma_1 = schedule(torch.ones(()))
    x_1 = torch.full((n + 1, 1, 1, 1), alpha_1 * mean, dtype=torch.float64)
    x_1[1] += (alpha_1**2 * std**2 + sigma_1**2).sqrt()
    steps = []
    sampler(Gaussian(schedule, mean, std), x_1, UnitDraws(n + 1), hook=steps.append)
    last = steps[-1].x_t.flatten()
    alpha, sigma = schedule(torch.tensor(steps[-1].t, dtype=torch.float64))
    assert abs(last[0] - alpha * mean) < 1e-12
    return abs(((last[1:] - last[0]) ** 2).sum() / (alpha**2 * std**2 + sigma**2) - 1).item()


@pytest.mark.parametrize(
    "schedule", [Straight(1600), Linear(1000), ZeroTerminalSNR(Linear(1600))], ids=["straight", "linear", "zero"]
)
@pytest.mark.parametrize(
    ("make", "low", "high", "largest"),
    [
        (lambda n: DPMpp(n, sde=True, grid="logsnr"), 1.9, 2.1, 0.002),
        (lambda n: DPMpp(n, sde=True, correction="heun", grid="logsnr"), 1.9, 2.2, 0.004),
        (lambda n: DDIM(n, 1.0, grid="logsnr"), 0.85, 1.0, 0.1),
    ],
    ids=["midpoint", "linear", "ddim-1"],
)
def test_the_variance_that_noise_leaves_converges_with_order_two_and_ddpms_with_one(make, low, high, largest, schedule):
    errors = [variance_error(make(n), schedule, 0.3, 0.5) for n in (80, 160, 320)]
    assert errors[-1] < largest
    assert all(low < order < high for order in orders(errors))


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.5), (-0.5, 0.25), (0.2, 1.5)])
@pytest.mark.parametrize("sampler", [DPMpp(100, sde=True), DPMpp(100, sde=True, correction="heun", grid="karras")])
def test_fewer_steps_of_the_sde_draw_from_the_data(sampler, mean, std):
    # As below for 1000 steps of the first order, with the same bars.
    schedule = ZeroTerminalSNR(Cosine(1000))
    rng = ImageRNG([1])
    image = sampler(Gaussian(schedule, mean, std), rng.randn(PIXELS, dtype=torch.float64), rng)
    assert abs(image.mean().item() - mean) < 4 * std / N**0.5
    assert abs(image.var().item() / std**2 - 1) < 4 * (2 / N) ** 0.5 + 0.02


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.5), (-0.5, 0.25), (0.2, 1.5)])
@pytest.mark.parametrize("sampler", [DDPM(), DDPM(variance="beta"), DDIM(1000, 1.0), DDIM(1000, 0.5)])
def test_many_steps_draw_from_the_data(sampler, mean, std):
    # 1000 steps leave a bias of 2 % of the variance at most; 4 standard errors of 20000 pixels are wider.
    schedule = ZeroTerminalSNR(Cosine(1000))
    rng = ImageRNG([1])
    image = sampler(Gaussian(schedule, mean, std), rng.randn(PIXELS, dtype=torch.float64), rng)
    assert abs(image.mean().item() - mean) < 4 * std / N**0.5
    assert abs(image.var().item() / std**2 - 1) < 4 * (2 / N) ** 0.5 + 0.02
    skewness = (((image - image.mean()) / image.std()) ** 3).mean().item()
    assert abs(skewness) < 4 * (6 / N) ** 0.5


@pytest.mark.parametrize(
    "sampler",
    [
        *(DDPM(8), DDIM(8, 0.0), DDIM(8, 0.5), DDIM(8, 1.0), DDIM(8, 0.5, grid="logsnr")),
        *(Heun(8), Heun(8, grid="trailing"), DPMpp(8), DPMpp(8, grid="logsnr")),
        *(DPMpp(8, sde=True), DPMpp(8, sde=True, correction="heun", grid="karras")),
    ],
    ids=lambda sampler: f"{type(sampler).__name__}-{sampler.grid}",
)
@pytest.mark.parametrize("schedule", [Cosine(1000), ZeroTerminalSNR(Linear(400)), Straight(1000)])
def test_a_single_point_keeps_its_marginals_in_any_number_of_steps(sampler, schedule):
    # For data that are one point, x_s must be alpha_s point + sigma_s noise after every step, however long.
    point, steps, rng = 0.7, [], ImageRNG([2])
    alpha_1, sigma_1 = schedule(torch.ones(()))
    x_1 = alpha_1 * point + sigma_1 * rng.randn(PIXELS, dtype=torch.float64)
    image = sampler(Gaussian(schedule, point, 0.0), x_1, rng, hook=steps.append)
    for step in steps[:-1]:
        alpha, sigma = (level.item() for level in schedule(torch.tensor(step.s, dtype=torch.float64)))
        assert abs(step.x_s.mean().item() - alpha * point) < 4 * sigma / N**0.5
        assert abs(step.x_s.var().item() / sigma**2 - 1) < 4 * (2 / N) ** 0.5
    torch.testing.assert_close(image, torch.full_like(image, point), rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", [Cosine(1000), ZeroTerminalSNR(Linear(400))], ids=["cosine", "zero"])
def test_beta_is_exact_for_standard_normal_data(schedule):
    steps, rng = [], ImageRNG([3])
    x_1 = rng.randn(PIXELS, dtype=torch.float64)
    DDPM(8, variance="beta")(Gaussian(schedule, 0.0, 1.0), x_1, rng, hook=steps.append)
    for step in steps[:-1]:
        assert abs(step.x_s.var().item() - 1) < 4 * (2 / N) ** 0.5


@pytest.mark.parametrize(
    "sampler",
    [DDPM(100), DDIM(100, 1.0), DDIM(100, 0.0), Heun(40), DPMpp(40), DPMpp(40, sde=True)],
    ids=["ddpm", "ddim-1", "ddim-0", "heun", "dpmpp", "dpmpp-sde"],
)
def test_a_finite_data_set_is_drawn_with_its_chances(sampler):
    schedule = ZeroTerminalSNR(Linear(400))
    points = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    chances, n = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 800
    rng = ImageRNG(range(n))
    images = sampler(Points(schedule, points, chances), rng.randn((1, 2, 2), dtype=torch.float64), rng)
    distance = (images[:, None] - points).flatten(2).abs().amax(2)
    assert distance.amin(1).max() < 1e-6
    drawn = torch.bincount(distance.argmin(1), minlength=3) / n
    assert ((drawn - chances).abs() < 4 * (chances * (1 - chances) / n).sqrt() + 0.01).all()


def test_beta_prev_is_the_published_loop():
    """x <- sqrt(1 / a_t) (x - (1 - a_t) / sqrt(1 - abar_t) e) + sqrt(beta_{t-1}) z, written out."""
    T, seeds, shape = 400, (4, 9), (3, 5, 5)
    schedule = Linear(T, 1e-4, 0.02)
    denoiser = Gaussian(schedule, 0.3, 0.5)

    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    a, abar = 1 - beta, torch.cumprod(1 - beta, 0)
    rng = ImageRNG(seeds)
    x = rng.randn(shape, dtype=torch.float64)
    for t in range(T - 1, -1, -1):
        x_0 = denoiser(x, torch.full((2,), (t + 1) / T, dtype=torch.float64))
        e = (x - abar[t].sqrt() * x_0) / (1 - abar[t]).sqrt()
        x = (1 / a[t]).sqrt() * (x - (1 - a[t]) / (1 - abar[t]).sqrt() * e)
        if t > 0:
            x = x + beta[t - 1].sqrt() * rng.randn(shape, dtype=torch.float64)

    rng = ImageRNG(seeds)
    ours = DDPM(variance="beta_prev")(denoiser, rng.randn(shape, dtype=torch.float64), rng)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-10)
    rng = ImageRNG(seeds)
    other = DDPM(variance="beta")(denoiser, rng.randn(shape, dtype=torch.float64), rng)
    assert (ours - other).abs().max() > 1e-3  # the oracle tells the variances apart
