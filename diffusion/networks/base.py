"""What all denoising networks share: their sizes, and the checks of what they are given."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from diffusion.errors import AntherError

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}


def activation(name: str, setting: str) -> nn.Module:
    """The activation of that name: gelu (the exact one), silu or relu.

    Raises:
        AntherError: another name; `setting` says which setting it came from.
    """
    if name not in ACTIVATIONS:
        raise AntherError(f"unknown {setting} {name!r}: choose one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]()


class DenoisingNetwork(nn.Module):
    """A network that is called as network(x_t, t, cond) -> (B, img_ch, img_size, img_size).

    Args:
        T: number of steps; scales time, and must be that of the schedule.
        img_ch: image channels.
        img_size: image height and width.
        c_embed_dim: width of the condition; 0 for a network without one.

    Attributes:
        bottleneck: name of the submodule whose output stands for an image, see `evaluation.embeddings`.
    """

    bottleneck: str

    def __init__(self, T: int, img_ch: int, img_size: int, c_embed_dim: int) -> None:
        super().__init__()
        if c_embed_dim < 0:
            raise AntherError(f"network.c_embed_dim = {c_embed_dim} is a width: 0 for no condition, or more.")
        self.T = T
        self.img_ch = img_ch
        self.img_size = img_size
        self.c_embed_dim = c_embed_dim

    def check_images(self, x_t: Tensor) -> None:
        """Refuses images of another shape than the network's.

        Raises:
            AntherError: naming both shapes.
        """
        if x_t.shape[1:] != (self.img_ch, self.img_size, self.img_size):
            raise AntherError(
                f"the network takes images of {self.img_ch} x {self.img_size} x {self.img_size} and was given "
                f"{' x '.join(map(str, x_t.shape[1:]))}: make network.img_ch and network.img_size those of the data."
            )

    def condition(self, cond: Tensor | None, n: int, like: Tensor) -> Tensor:
        """The condition (n, c_embed_dim) of the type and on the device of `like`; zeros for None.

        Raises:
            AntherError: a condition of another width.
        """
        if cond is None:
            cond = like.new_zeros(n, self.c_embed_dim)
        if cond.shape[1] != self.c_embed_dim:
            raise AntherError(
                f"the network takes conditions of width {self.c_embed_dim} and was given {cond.shape[1]}: set "
                "network.c_embed_dim to the conditioner's width."
            )
        return cond.to(like.dtype)

    def index(self, t: Tensor) -> Tensor:
        """The published index k - 1, from 0 to T - 1, of the schedule's entry k at t = k / T."""
        return t * self.T - 1
