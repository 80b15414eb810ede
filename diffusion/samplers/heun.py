"""Two calls a step, for a second order."""

from torch import Tensor

from diffusion.rng import ImageRNG
from diffusion.samplers.base import Conditioned, Sampler, Step


class Heun(Sampler):
    """Heun's method on the probability flow (Karras et al., 2022, arXiv 2206.00364, algorithm 1), for any alpha, sigma.

    With y = x / alpha and r = sigma / alpha the flow is dy / dr = eps. Euler's step, which is DDIM's, leads to x', and
    the noise found there corrects it:

        x_s = x' + alpha_s (r_t - r_s) / 2 (eps_t - eps_s),   eps_s = (x' - alpha_s E[x_0 | x'_s]) / sigma_s

    n steps call the denoiser 2 n - 1 times: the step to t = 0 is Euler's, as eps_0 is not defined. So is one from a
    time without signal, where r_t is infinite. Where r_t is only large, as at the end of `schedules.Cosine`, a long
    first step multiplies errors by it: take the grids `karras` or `logsnr`, whose steps are short there.

    Args:
        steps: number of steps; None takes every step of the schedule.
        clip: keep the expected x_0 in [-1, 1] in every call, see `Sampler`.
        grid: where the steps lie, see `samplers.grids`.
    """

    def __init__(self, steps: int | None = 18, clip: bool | float = False, grid: str = "karras") -> None:
        super().__init__(steps, clip, grid)

    def step(  # noqa: D102
        self, denoiser: Conditioned, x_t: Tensor, t: Tensor, s: Tensor, rng: ImageRNG, before: Step | None
    ) -> tuple[Tensor, Tensor]:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.schedule(t), denoiser.schedule(s)
        x_0 = denoiser(x_t, t)
        eps_t = (x_t - alpha_t.item() * x_0) / sigma_t.item()
        x_s = alpha_s.item() * x_0 + sigma_s.item() * eps_t
        if sigma_s > 0 and alpha_t > 0:
            eps_s = (x_s - alpha_s.item() * denoiser(x_s, s)) / sigma_s.item()
            x_s = x_s + (alpha_s * sigma_t / alpha_t - sigma_s).item() / 2 * (eps_t - eps_s)
        return x_s, x_0
