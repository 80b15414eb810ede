"""What a network may predict, to and from x_0: eps, x0, v or flow. Pure functions.

    eps   the noise                           (Ho et al., 2020, arXiv 2006.11239)
    x0    the clean image
    v     alpha_t eps - sigma_t x_0           (Salimans and Ho, 2022, arXiv 2202.00512)
    flow  eps - x_0, the speed on a straight path  (Lipman et al., 2023, arXiv 2210.02747)

Images are (B, C, H, W); alpha and sigma are broadcastable to them.
"""

from typing import Literal, get_args

from torch import Tensor

Target = Literal["eps", "x0", "v", "flow"]
TARGETS: tuple[str, ...] = get_args(Target)


def from_x_0(target: Target, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network should have said about x_t = alpha x_0 + sigma eps."""
    match target:
        case "eps":
            return eps
        case "x0":
            return x_0
        case "v":
            return alpha * eps - sigma * x_0
        case "flow":
            return eps - x_0


def to_x_0(target: Target, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean image that a network output implies; v assumes alpha^2 + sigma^2 = 1 nowhere."""
    match target:
        case "eps":
            return (x_t - sigma * output) / alpha
        case "x0":
            return output
        case "v":
            return (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)
        case "flow":
            return (x_t - sigma * output) / (alpha + sigma)


def x_0_per_output(target: Target, alpha: Tensor, sigma: Tensor) -> Tensor:
    """|d x_0 / d output|: how far an error of one unit in the output moves x_0."""
    match target:
        case "eps":
            return sigma / alpha
        case "x0":
            return alpha.new_ones(alpha.shape)
        case "v":
            return sigma / (alpha**2 + sigma**2)
        case "flow":
            return sigma / (alpha + sigma)
