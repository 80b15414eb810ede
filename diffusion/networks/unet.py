"""The published U-Nets: the course's and that of seed 001, one implementation."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from diffusion.errors import AntherError
from diffusion.networks.base import DenoisingNetwork
from diffusion.networks.blocks import (
    Down,
    Embed,
    GELUConv,
    Head,
    NearestUp,
    ResidualConv,
    SelfAttention,
    TransposedUp,
    repeated,
    sinusoidal,
)

SMALL, BIG = 8, 32  # groups of the norms: at the image itself, and everywhere else


class UNet(DenoisingNetwork):
    """Two levels down, two up; time and condition enter in the decoder alone.

    The context scales the decoder's maps and time shifts them: up1(c1 * x + t1), up2(c2 * x + t2). Hence the encoder's
    maps, `down2` among them, depend on the noisy image and on nothing else, and guidance computes them once.

    The families differ in three places:

        =========  ===============================  ==================  =====================
        family     middle                           up                  skips of up1, up2
        =========  ===============================  ==================  =====================
        course     flatten, 3 linear layers, ReLU   transposed conv     down2, down1 (before)
        handson    residual convs, or with          nearest, then conv  down1, down0 (after)
                   attention between two of them
        =========  ===============================  ==================  =====================

    Parameter names are those of the published state dicts.

    Args:
        T: number of steps; scales time, and must be that of the schedule.
        img_ch: image channels.
        img_size: image height and width, a multiple of 4.
        down_chs: channels at full, half and quarter resolution; multiples of 32 (the first two enter norms of 8 and of
            32 groups).
        t_embed_dim: sinusoidal features of time, even.
        c_embed_dim: width of the condition.
        family: `course` or `handson`.
        self_attention: attention in the middle; `handson` only.

    Raises:
        AntherError: an impossible size.
    """

    bottleneck = "down2"

    def __init__(
        self,
        T: int,
        img_ch: int,
        img_size: int,
        down_chs: Sequence[int] = (256, 256, 512),
        t_embed_dim: int = 8,
        c_embed_dim: int = 512,
        family: Literal["course", "handson"] = "course",
        self_attention: bool = False,
    ) -> None:
        super().__init__(T, img_ch, img_size, c_embed_dim)
        if img_size % 4 or img_size < 4:
            raise AntherError(f"the U-Net halves an image twice, so network.img_size = {img_size} must divide by 4.")
        if len(down_chs) != 3 or any(c % BIG for c in down_chs):
            raise AntherError(f"network.down_chs = {list(down_chs)} must be three multiples of {BIG}.")
        if family not in ("course", "handson"):
            raise AntherError(f"unknown network.family {family!r}: choose course or handson.")
        if self_attention and family == "course":
            raise AntherError("the course's U-Net has no attention: set network.family=handson.")
        if t_embed_dim < 4 or t_embed_dim % 2:
            raise AntherError(f"network.t_embed_dim = {t_embed_dim} must be even and at least 4.")
        self.t_embed_dim = t_embed_dim
        self.family = family
        d0, d1, d2 = down_chs
        u0, u1, u2 = d2, d1, d0
        latent = img_size // 4

        self.down0 = ResidualConv(img_ch, d0, SMALL)
        self.down1 = Down(d0, d1, BIG)
        self.down2 = Down(d1, d2, BIG)
        if family == "course":
            width = d2 * latent**2
            self.to_vec = nn.Sequential(nn.Flatten(), nn.GELU())
            self.dense_emb = nn.Sequential(
                nn.Linear(width, d1), nn.ReLU(), nn.Linear(d1, d1), nn.ReLU(), nn.Linear(d1, width), nn.ReLU()
            )
            self.up0 = nn.Sequential(nn.Unflatten(1, (u0, latent, latent)), GELUConv(u0, u0, BIG))
            self.up1: nn.Module = TransposedUp(u0, d2, u1, BIG)
            self.up2: nn.Module = TransposedUp(u1, d1, u2, BIG)
        else:
            middle = ResidualConv(d2, d2, BIG)
            self.mid_block = (
                nn.Sequential(middle, SelfAttention(d2), ResidualConv(d2, d2, BIG)) if self_attention else middle
            )
            self.up0 = nn.Sequential(GELUConv(u0, u0, BIG))
            self.up1 = NearestUp(u0, d1, u1, BIG)
            self.up2 = NearestUp(u1, d0, u2, BIG)
        self.t_emb1, self.t_emb2 = Embed(t_embed_dim, u0), Embed(t_embed_dim, u1)
        self.c_embed1, self.c_embed2 = Embed(c_embed_dim, u0), Embed(c_embed_dim, u1)
        self.out = Head(u2, img_ch, SMALL)

    def encode(self, x_t: Tensor) -> tuple[Tensor, ...]:
        """What does not depend on time and condition.

        Args:
            x_t: (B, img_ch, img_size, img_size).

        Returns:
            down0, the two skips of up1 and up2, and up0: all (B, ...).

        Raises:
            AntherError: images of another shape than the network's.
        """
        self.check_images(x_t)
        down0 = self.down0(x_t)
        down1 = self.down1(down0)
        down2 = self.down2(down1)
        if self.family == "course":
            return down0, down2, down1, self.up0(self.dense_emb(self.to_vec(down2)))
        return down0, down1, down0, self.up0(self.mid_block(down2))

    def decode(self, features: tuple[Tensor, ...], t: Tensor, cond: Tensor | None) -> Tensor:
        """The network's output from what `encode` returned.

        Args:
            features: of B images.
            t: (k B,) in (0, 1].
            cond: (k B, c_embed_dim), k conditions for each image, those of all images together; None is the zero
                vector.

        Returns:
            (k B, img_ch, img_size, img_size).
        """
        down0, skip1, skip2, up0 = features
        cond = self.condition(cond, len(t), down0)
        # Entry k of the schedule sits at t = k / T; the published networks were trained on the index k - 1.
        # In the weights' own precision: the maps are bfloat16 under autocast, which has not as many times as T.
        time = sinusoidal((t - 1 / self.T).to(next(self.parameters()).dtype), self.t_embed_dim)
        up1 = self.up1(self.c_embed1(cond) * repeated(up0, len(cond)) + self.t_emb1(time), skip1)
        up2 = self.up2(self.c_embed2(cond) * up1 + self.t_emb2(time), skip2)
        output: Tensor = self.out(up2, down0)
        return output

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The network's output for x_t at time t under a condition; see `encode` and `decode` for shapes."""
        return self.decode(self.encode(x_t), t, cond)
