"""The building blocks of the course's U-Net; attribute names are those of its published state dicts."""

import math

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


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


def repeated(x: Tensor, n: int) -> Tensor:
    """B rows as n = k B rows: all of them k times over."""
    return x if len(x) == n else x.repeat(n // len(x), *(1,) * (x.ndim - 1))


def conv_with_skip(conv: nn.Conv2d, x: Tensor, skip: Tensor) -> Tensor:
    """conv(cat([x, skip], 1)), where the skip has B rows and x has k B of them, for k conditions of the same images.

    A convolution is linear, so it is the sum of its halves, and the half over the skip is computed once for all k.
    """
    own = x.shape[1]
    shared = F.conv2d(skip, conv.weight[:, own:], conv.bias, padding=1)
    return F.conv2d(x, conv.weight[:, :own], padding=1) + repeated(shared, len(x))


def conv_of_doubled(x: Tensor, weight: Tensor) -> Tensor:
    """conv2d(interpolate(x, scale_factor=2), weight, padding=1) without the doubled map.

    Doubling repeats pixels, so of its 3 x 3 pixels a window sees 2 x 2 different ones: each of the four places that an
    output pixel may have in its pair of rows and columns has a 2 x 2 kernel of its own, and 4 / 9 of the products are
    left (Shi et al., 2016, arXiv 1609.07009).

    Args:
        x: (B, i, H, W).
        weight: (o, i, 3, 3).

    Returns:
        (B, o, 2 H, 2 W).
    """
    (n, _, h, w), o = x.shape, len(weight)

    def pairs(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        # The upper of two doubled rows sees the row above once and its own twice; the lower its own twice, then one.
        first, middle, last = kernel.unbind(dim)
        return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)

    kernels = torch.cat([kernel for rows in pairs(weight, 2) for kernel in pairs(rows, 3)])
    places = F.conv2d(x, kernels, padding=1).view(n, 2, 2, o, h + 1, w + 1)
    rows = torch.stack([places[:, 0, :, :, :h], places[:, 1, :, :, 1:]], 4)  # (n, 2, o, h, 2, w + 1)
    columns = torch.stack([rows[:, 0, ..., :w], rows[:, 1, ..., 1:]], 5)  # (n, o, h, 2, w, 2)
    return columns.reshape(n, o, 2 * h, 2 * w)


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

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """As `conv_with_skip`: x (k B, i, H, W), skip (B, skip, H, W) -> (k B, o, 2 H, 2 W)."""
        up, own = self.model[0], x.shape[1]
        assert isinstance(up, nn.ConvTranspose2d)
        shared = F.conv_transpose2d(skip, up.weight[own:], up.bias, stride=2)
        joined = F.conv_transpose2d(x, up.weight[:own], stride=2) + repeated(shared, len(x))
        out: Tensor = self.model[1:](joined)
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
        self.conv_in = nn.Conv2d(i + skip, o, 3, padding=1)
        self.model = nn.Sequential(*(GELUConv(o, o, groups) for _ in range(4)))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """As `conv_with_skip`: x (k B, i, H, W), skip (B, skip, 2 H, 2 W) -> (k B, o, 2 H, 2 W)."""
        conv, own = self.conv_in, x.shape[1]
        shared = F.conv2d(skip, conv.weight[:, own:], conv.bias, padding=1)
        out: Tensor = self.model(conv_of_doubled(x, conv.weight[:, :own]) + repeated(shared, len(x)))
        return out


class Head(nn.Sequential):
    """Joins the skip, then convolution, norm, ReLU and the convolution to the image's channels.

    Args:
        c: channels of the input and of the skip.
        img_ch: image channels.
        groups: groups of the norm.
    """

    def __init__(self, c: int, img_ch: int, groups: int) -> None:
        first, last = nn.Conv2d(2 * c, c, 3, padding=1), nn.Conv2d(c, img_ch, 3, padding=1)
        super().__init__(first, nn.GroupNorm(groups, c), nn.ReLU(), last)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        """As `conv_with_skip`: x (k B, c, H, W), skip (B, c, H, W) -> (k B, img_ch, H, W)."""
        first, *others = self
        assert isinstance(first, nn.Conv2d)
        out = conv_with_skip(first, x, skip)
        for layer in others:
            out = layer(out)
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
