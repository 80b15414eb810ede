"""One call a step and a second order: the step before is remembered."""

from typing import Literal

from torch import Tensor

from diffusion.errors import AntherError
from diffusion.rng import ImageRNG
from diffusion.samplers.base import Conditioned, Sampler, Step
from diffusion.samplers.grids import noise_level


class DPMpp(Sampler):
    """DPM-Solver++, 2M and SDE-2M (Lu et al., 2022, arXiv 2211.01095, algorithm 2 and section 6), any alpha and sigma.

    In lambda = log(alpha / sigma) the flow is linear but for x_0, so with h = lambda_s - lambda_t it is solved exactly
    for an x_0 that is constant over the step, and the change of x_0 is taken from the step before, of length h':

        x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^{-h}) x_0 + alpha_s c (x_0 - x_0') h / h'

    The first step has no step before and the last one, to t = 0, is infinitely long; both are DDIM's. The SDE form
    puts 2 h for h in the parentheses and in c, multiplies x_t by another e^{-h}, and adds sigma_s sqrt(1 - e^{-2 h}) z;
    its first order is DDPM's.

    Args:
        steps: number of steps; None takes every step of the schedule.
        sde: draw fresh noise in every step.
        correction: c, of second order either way: `midpoint`, (1 - e^{-h}) / 2, the published solver's; or `heun`,
            1 - (1 - e^{-h}) / h, exact for an x_0 that is linear in lambda.
        clip: keep the expected x_0 in [-1, 1] in every step, see `Sampler`.
        grid: where the steps lie, see `samplers.grids`.
    """

    def __init__(
        self,
        steps: int | None = 20,
        sde: bool = False,
        correction: Literal["midpoint", "heun"] = "midpoint",
        clip: bool | float = False,
        grid: str = "trailing",
    ) -> None:
        super().__init__(steps, clip, grid)
        if correction not in ("midpoint", "heun"):
            raise AntherError(f"unknown correction {correction!r}: set sampler.correction to midpoint or heun.")
        self.sde = sde
        self.correction = correction

    def step(  # noqa: D102
        self, denoiser: Conditioned, x_t: Tensor, t: Tensor, s: Tensor, rng: ImageRNG, before: Step | None
    ) -> tuple[Tensor, Tensor]:
        schedule = denoiser.schedule
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
        x_0 = denoiser(x_t, t)
        # e^{-h}: 0 in a step from no signal and in one to no noise.
        shrink = alpha_t / alpha_s * sigma_s / sigma_t
        gain = 1 - (shrink**2 if self.sde else shrink)
        keep = sigma_s / sigma_t * (shrink if self.sde else 1)
        x_s = keep.item() * x_t + (alpha_s * gain).item() * x_0
        if before is not None and s > 0:
            h = -shrink.log()
            h_before = (noise_level(schedule, t.new_tensor(before.t)) * alpha_t / sigma_t).log()
            change = gain / 2 if self.correction == "midpoint" else 1 - gain / (h * (2 if self.sde else 1))
            x_s = x_s + (alpha_s * change * h / h_before).item() * (x_0 - before.x_0)
        if self.sde and s > 0:
            noise = sigma_s * (1 - shrink**2).sqrt()
            x_s = x_s + noise.item() * rng.randn(x_t.shape[1:], x_t.device, x_t.dtype)
        return x_s, x_0
