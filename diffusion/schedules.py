"""How much signal and noise an image holds at time t: t in [0, 1] -> (alpha_t, sigma_t), in float64.

x_t = alpha_t x_0 + sigma_t eps, with t = 0 the clean image and t = 1 the noisiest. A table of T betas is the schedule
whose entry k in 1..T sits at t = k / T.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion.errors import AntherError


def check_times(t: Tensor) -> None:
    """Raises ValueError when a time lies outside [0, 1]."""
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"times lie in [0, 1], not in [{t.min().item()}, {t.max().item()}]")


class Schedule(ABC):
    """Signal and noise level as functions of time.

    Attributes:
        T: number of steps on which the schedule is defined exactly; training draws t from k / T, k = 1..T.
    """

    T: int

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise level.

        Args:
            t: times in [0, 1], any shape, any float type.

        Returns:
            alpha_t and sigma_t, float64, of the shape and on the device of `t`.

        Raises:
            ValueError: a time outside [0, 1].
        """

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_t^2 / sigma_t^2; infinite at t = 0, falling in t."""
        alpha, sigma = self(t)
        return (alpha / sigma) ** 2

    @property
    def terminal_alpha(self) -> float:
        """Signal level at t = 1: 0 means that the last step holds no signal at all."""
        alpha, _ = self(torch.ones(()))
        return alpha.item()


def check_steps(T: int) -> None:
    """Refuses a schedule without steps.

    Raises:
        AntherError: T below 1.
    """
    if T < 1:
        raise AntherError(f"T = {T} is no number of steps: give 1 or more.")


class TableSchedule(Schedule):
    """A variance-preserving schedule given by a table of betas (Ho et al., 2020, arXiv 2006.11239).

    alpha_t^2 = prod_{j <= k} (1 - beta_j) at t = k / T, and alpha_t^2 + sigma_t^2 = 1. Between entries alpha_t^2 is
    linear in t, so samplers may stop anywhere.

    Args:
        betas: (T,), float64, each in (0, 1].

    Raises:
        AntherError: the table is empty or a beta lies outside (0, 1].
    """

    def __init__(self, betas: Tensor) -> None:
        if betas.numel() == 0 or not bool(((betas > 0) & (betas <= 1)).all()):
            raise AntherError(
                f"the noise schedule {type(self).__name__} has a beta outside (0, 1]: choose T and its limits so that "
                "every step adds noise."
            )
        self.T = betas.numel()
        self.betas = betas.double()
        self.alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - self.betas, 0)])

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        check_times(t)
        position = t.double() * self.T
        # k / T * T may miss k by one unit in the last place, and a table entry must come out exactly.
        nearest = position.round()
        position = torch.where((position - nearest).abs() < 1e-4, nearest, position)
        lower = position.floor().long().clamp(max=self.T - 1)
        table = self.alpha_bar.to(t.device)
        alpha_bar = torch.lerp(table[lower], table[lower + 1], position - lower)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


class Linear(TableSchedule):
    """Betas rise linearly (Ho et al., 2020, arXiv 2006.11239).

    Args:
        T: number of steps.
        beta_start: first beta.
        beta_end: last beta. With T well below 1000 and the usual 0.02 the last image still shows signal (alpha_1 is
            0.13 for T = 400); `rescale_from` and `ZeroTerminalSNR` mend that.
        rescale_from: number of steps that the two betas are meant for: both are multiplied by rescale_from / T, so that
            T steps add about the noise of that many (Dhariwal and Nichol, 2021, arXiv 2105.05233, in their code).
    """

    def __init__(
        self, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, rescale_from: int | None = None
    ) -> None:
        check_steps(T)
        scale = 1.0 if rescale_from is None else rescale_from / T
        super().__init__(torch.linspace(scale * beta_start, scale * beta_end, T, dtype=torch.float64))


class ScaledLinear(TableSchedule):
    """Square roots of the betas rise linearly; also called quadratic (Rombach et al., 2022, arXiv 2112.10752).

    Args:
        T: number of steps.
        beta_start: first beta.
        beta_end: last beta.
    """

    def __init__(self, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        check_steps(T)
        super().__init__(torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2)


class Cosine(TableSchedule):
    """alpha_t^2 = cos^2((t + s) / (1 + s) pi / 2), normalised at t = 0 (Nichol and Dhariwal, 2021, arXiv 2102.09672).

    Args:
        T: number of steps.
        s: offset that keeps the first betas from vanishing.
        beta_max: upper limit of a beta; keeps the last step from dividing by zero.
    """

    def __init__(self, T: int = 1000, s: float = 0.008, beta_max: float = 0.999) -> None:
        check_steps(T)
        t = torch.linspace(0, 1, T + 1, dtype=torch.float64)
        alpha_bar = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
        super().__init__((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=beta_max))


class Sigmoid(TableSchedule):
    """Betas follow a logistic curve between two limits (Xu et al., 2022, GeoDiff, arXiv 2203.02923).

    Args:
        T: number of steps.
        beta_start: lower limit of the betas.
        beta_end: upper limit of the betas.
    """

    def __init__(self, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        check_steps(T)
        curve = torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64))
        super().__init__(curve * (beta_end - beta_start) + beta_start)


class ZeroTerminalSNR(TableSchedule):
    """Any table, shifted and scaled so that alpha_1 = 0 and the first entry stays (Lin et al., 2024, arXiv 2305.08891).

    alpha_t <- (alpha_t - alpha_1) alpha_{1/T} / (alpha_{1/T} - alpha_1). Sampling starts from pure noise, so a model
    trained on a schedule that keeps some signal at t = 1 meets an image it never saw; this closes the gap. The eps
    target has no information at t = 1 and is refused with it (see `Denoiser`).

    Args:
        schedule: the table to rescale, at least 2 steps.
    """

    def __init__(self, schedule: TableSchedule) -> None:
        if schedule.T < 2:
            raise AntherError("a schedule needs T of 2 or more to be rescaled to zero terminal SNR; raise schedule.T.")
        alpha = schedule.alpha_bar[1:].sqrt()
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        alpha_bar = alpha**2
        super().__init__(1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]]))


class Straight(Schedule):
    """alpha_t = 1 - t, sigma_t = t: the straight paths of flow matching (Lipman et al., 2023, arXiv 2210.02747).

    Args:
        T: number of times at which training draws t.
    """

    def __init__(self, T: int = 1000) -> None:
        check_steps(T)
        self.T = T

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        check_times(t)
        t = t.double()
        return 1 - t, t
