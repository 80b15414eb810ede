"""The building blocks of the course's U-Net; attribute names are those of its published state dicts."""

import math

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn


class GELUConv(nn.Module):
    """3 x 3 convolution, group norm, GELU: (B, i, H, W) -> (B, o, H, W).

    Args:
        i: input channels.
        o: output channels.
        groups: number of groups of the norm (not channels per group).
    """

    def __init__(self, i: int, o: int, groups: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(groups, o), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.model(x)
        return out


class RearrangePool(nn.Module):
    """Halves the resolution without losing a pixel: 2 x 2 blocks become channels, then a `GELUConv` back to c."""

    def __init__(self, c: int, groups: int) -> None:
        super().__init__()
        self.rearrange = nn.PixelUnshuffle(2)
        self.conv = GELUConv(4 * c, c, groups)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.conv(self.rearrange(x))
        return out


class Down(nn.Module):
    """Two convolutions, then half the resolution: (B, i, H, W) -> (B, o, H/2, W/2)."""

    def __init__(self, i: int, o: int, groups: int) -> None:
        super().__init__()
        self.model = nn.Sequential(GELUConv(i, o, groups), GELUConv(o, o, groups), RearrangePool(o, groups))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.model(x)
        return out


class TransposedUp(nn.Module):
    """Joins the skip, doubles the resolution by a transposed convolution, then four convolutions (the course).

    Args:
        i: channels of the input.
        skip: channels of the skip, at the input's resolution.
        o: output channels.
        groups: groups of the norms.
    """

    def __init__(self, i: int, skip: int, o: int, groups: int) -> None:
        super().__init__()
        convs = [GELUConv(o, o, groups) for _ in range(4)]
        self.model = nn.Sequential(nn.ConvTranspose2d(i + skip, o, 2, 2), *convs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.model(torch.cat([x, skip], 1))
        return out


class NearestUp(nn.Module):
    """Doubles the resolution by repetition, joins the skip, then five convolutions (seed 001).

    Args:
        i: channels of the input.
        skip: channels of the skip, at the output's resolution.
        o: output channels.
        groups: groups of the norms.
    """

    def __init__(self, i: int, skip: int, o: int, groups: int) -> None:
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.conv_in = nn.Conv2d(i + skip, o, 3, padding=1)
        self.model = nn.Sequential(*(GELUConv(o, o, groups) for _ in range(4)))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.model(self.conv_in(torch.cat([self.upsample(x), skip], 1)))
        return out


class ResidualConv(nn.Module):
    """y = A(x); y + B(y), where A and B are `GELUConv`s."""

    def __init__(self, i: int, o: int, groups: int) -> None:
        super().__init__()
        self.conv1 = GELUConv(i, o, groups)
        self.conv2 = GELUConv(o, o, groups)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.conv1(x)
        out: Tensor = x + self.conv2(x)
        return out


class SelfAttention(nn.Module):
    """Attention over the pixels of a map, half of it added: x + 0.5 attention(norm(x)).

    Args:
        c: channels.
        heads: attention heads.
    """

    def __init__(self, c: int, heads: int = 1) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(c, heads, batch_first=True)
        self.ln = nn.LayerNorm([c])

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        tokens = x.flatten(2).transpose(1, 2)
        normed = self.ln(tokens)
        attended, _ = self.mha(normed, normed, normed, need_weights=False)
        out: Tensor = (tokens + 0.5 * attended).transpose(1, 2).reshape(x.shape)
        return out

    def weights(self, x: Tensor) -> Tensor:
        """See `attention.Attends`."""
        normed = self.ln(x.flatten(2).transpose(1, 2))
        weights: Tensor = self.mha(normed, normed, normed, average_attn_weights=False)[1]
        return weights


class Embed(nn.Module):
    """A vector as a map of one pixel: (B, i) -> (B, o, 1, 1)."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(i, o), nn.GELU(), nn.Linear(o, o), Rearrange("b c -> b c 1 1"))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.model(x)
        return out


def sinusoidal(t: Tensor, dim: int) -> Tensor:
    """[sin(f_k t), cos(f_k t)] with f_k falling from 1 to 1e-4 (Vaswani et al., 2017, arXiv 1706.03762).

    Args:
        t: (B,).
        dim: even, 4 or more.

    Returns:
        (B, dim), of the type of `t`.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    angles = t[:, None] * frequencies.to(t.dtype)
    return torch.cat([angles.sin(), angles.cos()], 1)
