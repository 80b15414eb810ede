"""Loss weight as a function of signal-to-noise ratio and target.

The loss is a distance between network output and target. A `Weighting` gives its factor: (alpha, sigma, target) ->
weight, all float64 (B,). Weights that the literature states for the error in x_0 are converted by the factor with which
each target turns output errors into x_0 errors (`targets.x_0_per_output`).
"""

from collections.abc import Callable

from torch import Tensor

from diffusion.errors import AntherError
from diffusion.targets import Target, x_0_per_output

Weighting = Callable[[Tensor, Tensor, Target], Tensor]


def unit(alpha: Tensor, sigma: Tensor, target: Target) -> Tensor:
    """Weight 1: the plain loss on the target."""
    return alpha.new_ones(alpha.shape)


class MinSNR:
    """min(SNR, gamma) on the error in x_0 (Hang et al., 2023, arXiv 2303.09556).

    On eps this is min(SNR, gamma) / SNR, on v min(SNR, gamma) / (SNR + 1). It stops the many nearly clean times from
    outvoting the noisy ones.

    Args:
        gamma: the cap, above 0.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise AntherError(f"weighting.gamma = {gamma} caps a ratio above 0: choose one, such as 5.")
        self.gamma = gamma

    def __call__(self, alpha: Tensor, sigma: Tensor, target: Target) -> Tensor:
        """The weight, (B,)."""
        if target == "eps":
            # min(SNR, gamma) / SNR without dividing by an alpha that may be tiny.
            return (self.gamma * sigma**2 / alpha**2).clamp(max=1)
        snr = (alpha / sigma) ** 2
        return snr.clamp(max=self.gamma) * x_0_per_output(target, alpha, sigma) ** 2


class P2:
    """1 / (k + SNR)^gamma on the error in eps (Choi et al., 2022, arXiv 2204.00227).

    It takes weight from the nearly clean times, at which only what nobody sees is left to learn.

    Args:
        gamma: how much, 0 or more; 0 is the plain loss on eps.
        k: keeps the weight finite without signal, above 0.
    """

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        if gamma < 0 or k <= 0:
            raise AntherError(
                f"weighting.gamma = {gamma} is 0 or more, and weighting.k = {k} above 0: take 1 for both."
            )
        self.gamma, self.k = gamma, k

    def __call__(self, alpha: Tensor, sigma: Tensor, target: Target) -> Tensor:
        """The weight, (B,)."""
        snr = (alpha / sigma) ** 2
        on_eps = (self.k + snr) ** -self.gamma
        if target == "eps":
            return on_eps
        # An error in x_0 is one of SNR times its square in eps.
        return on_eps * snr * x_0_per_output(target, alpha, sigma) ** 2
