"""The residual block and the attention that the ADM U-Net and the KL autoencoder are made of.

Attribute names are those of diffusers, so that state dicts go both ways.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention, silu

from diffusion.errors import AntherError
from diffusion.networks.attention import softmax_weights

Resample = Literal["up", "down"] | None

GROUPS = 32  # of every norm


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all parameters zero, so that a residual branch begins as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResidualBlock(nn.Module):
    """norm, SiLU, (resample,) conv, norm, SiLU, dropout, conv; and the input, by 1 x 1 if need be.

    With time the second norm is adaptive: norm(h) (1 + scale) + shift, both linear in SiLU(time) (Dhariwal and Nichol,
    2021, arXiv 2105.05233). The last convolution begins at zero.

    Args:
        i: input channels.
        o: output channels.
        time: width of the time embedding; None for a block without.
        dropout: probability.
        eps: of the norms.
        resample: up doubles the resolution by repetition, down halves it by the mean.
    """

    def __init__(
        self,
        i: int,
        o: int,
        time: int | None = None,
        dropout: float = 0.0,
        eps: float = 1e-5,
        resample: Resample = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise AntherError(f"network.dropout = {dropout} is a probability below 1: choose it in [0, 1).")
        self.resample = resample
        self.norm1 = nn.GroupNorm(GROUPS, i, eps)
        self.conv1 = nn.Conv2d(i, o, 3, padding=1)
        self.time_emb_proj = None if time is None else nn.Linear(time, 2 * o)
        self.norm2 = nn.GroupNorm(GROUPS, o, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(o, o, 3, padding=1))
        self.conv_shortcut = None if i == o else nn.Conv2d(i, o, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """The block's output for x (B, i, H, W) and, where it takes one, an embedding of time (B, time)."""
        h = silu(self.norm1(x))
        if self.resample == "up":
            x, h = (interpolate(map_, scale_factor=2.0, mode="nearest") for map_ in (x, h))
        elif self.resample == "down":
            x, h = avg_pool2d(x, 2), avg_pool2d(h, 2)
        h = self.norm2(self.conv1(h))
        if self.time_emb_proj is not None:
            assert time is not None
            scale, shift = self.time_emb_proj(silu(time))[:, :, None, None].chunk(2, 1)
            h = h * (1 + scale) + shift
        h = self.conv2(self.dropout(silu(h)))
        out: Tensor = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return out


class AttentionBlock(nn.Module):
    """x + attention(norm(x)) over the pixels of a map; the last layer begins at zero.

    Args:
        c: channels.
        heads: attention heads.
        eps: of the norm.
    """

    def __init__(self, c: int, heads: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = nn.GroupNorm(GROUPS, c, eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, c) for _ in range(3))
        self.to_out = nn.ModuleList([zeroed(nn.Linear(c, c))])

    def _heads(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """(B, H W, C) -> (B, heads, H W, d)."""
        parts: Tensor = layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
        return parts

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        tokens = self.group_norm(x).flatten(2).mT
        q, k, v = (self._heads(layer, tokens) for layer in (self.to_q, self.to_k, self.to_v))
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = x + self.to_out[0](mixed).mT.reshape(x.shape)
        return out

    def weights(self, x: Tensor) -> Tensor:
        """See `attention.Attends`."""
        tokens = self.group_norm(x).flatten(2).mT
        return softmax_weights(self._heads(self.to_q, tokens), self._heads(self.to_k, tokens))


class Middle(nn.Module):
    """A residual block, attention, a residual block, at one width.

    Args:
        c: channels.
        heads: attention heads.
        time: see `ResidualBlock`.
        dropout: see `ResidualBlock`.
        eps: see `ResidualBlock`.
    """

    def __init__(self, c: int, heads: int, time: int | None = None, dropout: float = 0.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(c, heads, eps)])
        self.resnets = nn.ModuleList([ResidualBlock(c, c, time, dropout, eps) for _ in range(2)])

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:  # noqa: D102
        out: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x, time)), time)
        return out


class Stage(nn.Module):
    """What happens at one resolution: blocks, each followed by attention if there is any, and a change of resolution.

    Args:
        resnets: the blocks.
        attentions: one per block, or none.
        downsamplers: what halves the resolution afterwards: one layer or none.
        upsamplers: what doubles it.
    """

    def __init__(
        self,
        resnets: Iterable[nn.Module],
        attentions: Iterable[nn.Module] = (),
        downsamplers: Iterable[nn.Module] = (),
        upsamplers: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList(downsamplers)
        self.upsamplers = nn.ModuleList(upsamplers)

    def block(self, k: int, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Block k and its attention."""
        x = self.resnets[k](x, time)
        if self.attentions:
            x = self.attentions[k](x)
        return x


def check_channels(channels: int, channel_mult: Sequence[int], img_size: int, least: int = 1) -> None:
    """Refuses what these blocks cannot be made of.

    Args:
        channels: of level 0.
        channel_mult: channels of each level in units of `channels`.
        img_size: image height and width.
        least: number of levels.

    Raises:
        AntherError: too few levels, channels that the norms cannot group, or a size that cannot be halved so often.
    """
    levels = len(channel_mult)
    if levels < least:
        raise AntherError(f"network.channel_mult has {levels} levels and needs {least} or more.")
    if channels < GROUPS or any(channels * mult % GROUPS or mult < 1 for mult in [1, *channel_mult]):
        raise AntherError(f"network.channels = {channels} times network.channel_mult must be multiples of {GROUPS}.")
    if img_size < 1 or img_size % 2 ** (levels - 1):
        raise AntherError(
            f"network.channel_mult has {levels} levels, so network.img_size = {img_size} must divide by "
            f"{2 ** (levels - 1)}."
        )
