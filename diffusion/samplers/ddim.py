"""Few steps, with as much fresh noise as wanted."""

from torch import Tensor

from diffusion.errors import AntherError
from diffusion.rng import ImageRNG
from diffusion.samplers.base import Conditioned, Sampler, Step


class DDIM(Sampler):
    """Denoising diffusion implicit models (Song et al., 2021, arXiv 2010.02502), for any alpha and sigma.

        x_s = alpha_s x_0 + sqrt(sigma_s^2 - n^2) eps + n z,   n = eta sigma_s / sigma_t sqrt(sigma_{t|s}^2)

    where x_0 is the denoiser's answer, eps = (x_t - alpha_t x_0) / sigma_t the noise that goes with it, and
    sigma_{t|s}^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2.

    eta = 0 is Euler's method, whichever way the flow is written: on x / alpha in the time sigma / alpha (Karras et al.,
    2022, arXiv 2206.00364) and, on straight paths (`schedules.Straight`), on x in t. So there is no other Euler here;
    conf/sampler/euler.yaml is this with eta = 0.

    Args:
        steps: number of steps; None takes every step of the schedule.
        eta: 0 draws no noise after the first image, 1 is DDPM with the posterior variance.
        clip: keep the expected x_0 in [-1, 1] in every step, see `Sampler`.
        grid: where the steps lie, see `samplers.grids`.
    """

    def __init__(
        self, steps: int | None = 50, eta: float = 0.0, clip: bool | float = False, grid: str = "trailing"
    ) -> None:
        super().__init__(steps, clip, grid)
        if not 0 <= eta <= 1:
            raise AntherError(f"eta lies in [0, 1], not at {eta}: set sampler.eta.")
        self.eta = eta

    def step(  # noqa: D102
        self, denoiser: Conditioned, x_t: Tensor, t: Tensor, s: Tensor, rng: ImageRNG, before: Step | None
    ) -> tuple[Tensor, Tensor]:
        x_0 = denoiser(x_t, t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.schedule(t), denoiser.schedule(s)
        noise = self.eta * sigma_s / sigma_t * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp(min=0).sqrt()
        eps_weight = (sigma_s**2 - noise**2).clamp(min=0).sqrt() / sigma_t
        # Coefficients are combined in float64; images keep their own type.
        x_s = (alpha_s - alpha_t * eps_weight).item() * x_0 + eps_weight.item() * x_t
        if noise > 0:
            x_s = x_s + noise.item() * rng.randn(x_t.shape[1:], x_t.device, x_t.dtype)
        return x_s, x_0
