"""The sampler that diffusion models were born with."""

from typing import Literal

from torch import Tensor

from diffusion.errors import AntherError
from diffusion.rng import ImageRNG
from diffusion.samplers.base import Conditioned, Sampler, Step


class DDPM(Sampler):
    """Ancestral sampling (Ho et al., 2020, arXiv 2006.11239), for any alpha, sigma and number of steps.

    x_s is drawn from q(x_s | x_t, x_0) with the denoiser's answer for x_0. With a = alpha_t / alpha_s and
    sigma_{t|s}^2 = sigma_t^2 - a^2 sigma_s^2:

        mean = a sigma_s^2 / sigma_t^2 x_t + alpha_s sigma_{t|s}^2 / sigma_t^2 x_0

    Args:
        steps: number of steps; None takes every step of the schedule.
        variance: of the noise that is added.
            posterior  sigma_{t|s}^2 sigma_s^2 / sigma_t^2, exact for data that are a single point;
            beta       sigma_{t|s}^2, exact for data that are standard normal;
            beta_prev  beta of the step below, as the course's code has it, defined where all steps are taken:
                       only to compare with images drawn by that code.
        clip: keep the expected x_0 in [-1, 1] in every step, see `Sampler`.
    """

    def __init__(
        self,
        steps: int | None = None,
        variance: Literal["posterior", "beta", "beta_prev"] = "posterior",
        clip: bool | float = False,
    ) -> None:
        super().__init__(steps, clip)
        if variance not in ("posterior", "beta", "beta_prev"):
            raise AntherError(f"unknown variance {variance!r}: set sampler.variance to posterior, beta or beta_prev.")
        self.variance = variance

    def step(  # noqa: D102
        self, denoiser: Conditioned, x_t: Tensor, t: Tensor, s: Tensor, rng: ImageRNG, before: Step | None
    ) -> tuple[Tensor, Tensor]:
        x_0 = denoiser(x_t, t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.schedule(t), denoiser.schedule(s)
        ratio = alpha_t / alpha_s
        fresh = sigma_t**2 - (ratio * sigma_s) ** 2
        x_s = (ratio * sigma_s**2 / sigma_t**2).item() * x_t + (alpha_s * fresh / sigma_t**2).item() * x_0
        if s > 0:
            match self.variance:
                case "posterior":
                    variance = fresh * sigma_s**2 / sigma_t**2
                case "beta":
                    variance = fresh
                case "beta_prev":
                    alpha_r, sigma_r = denoiser.schedule((2 * s - t).clamp(min=0))
                    variance = sigma_s**2 - (alpha_s / alpha_r * sigma_r) ** 2
            x_s = x_s + variance.clamp(min=0).sqrt().item() * rng.randn(x_t.shape[1:], x_t.device, x_t.dtype)
        return x_s, x_0
