"""The U-Net of the Annotated Diffusion Model, with its variants: the networks of seed 004."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion.errors import AntherError
from diffusion.networks.attention import FullAttention, LinearAttention
from diffusion.networks.base import DenoisingNetwork, activation
from diffusion.networks.blocks import sinusoidal

Attention = Literal["linear", "full"]
NormOrder = Literal["pre", "post"]

ATTENTION = {"linear": LinearAttention, "full": FullAttention}


class ConvNextBlock(nn.Module):
    """Depthwise 7 x 7, time, norm, 3 x 3 to wider, activation, norm, 3 x 3 back; and the input, by 1 x 1 if need be.

    After Liu et al., 2022, arXiv 2201.03545; here with 3 x 3 convolutions and group norms of one group.

    Args:
        i: input channels.
        o: output channels.
        time: width of the time embedding.
        act: name of the activation.
        mult: how much wider the middle is.
    """

    def __init__(self, i: int, o: int, time: int, act: str, mult: int = 2) -> None:
        super().__init__()
        self.mlp = nn.Sequential(activation(act, "network.act"), nn.Linear(time, i))
        self.ds_conv = nn.Conv2d(i, i, 7, padding=3, groups=i)
        self.net = nn.Sequential(
            nn.GroupNorm(1, i),
            nn.Conv2d(i, mult * o, 3, padding=1),
            activation(act, "network.act"),
            nn.GroupNorm(1, mult * o),
            nn.Conv2d(mult * o, o, 3, padding=1),
        )
        self.res_conv = nn.Identity() if i == o else nn.Conv2d(i, o, 1)

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:  # noqa: D102
        h = self.ds_conv(x)
        if time is not None:
            h = h + self.mlp(time)[:, :, None, None]
        out: Tensor = self.net(h) + self.res_conv(x)
        return out


class ConvNormAct(nn.Module):
    """3 x 3 convolution, group norm, activation."""

    def __init__(self, i: int, o: int, groups: int, act: str) -> None:
        super().__init__()
        self.proj = nn.Conv2d(i, o, 3, padding=1)
        self.norm = nn.GroupNorm(groups, o)
        self.act = activation(act, "network.act")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.act(self.norm(self.proj(x)))
        return out


class ResnetBlock(nn.Module):
    """Two `ConvNormAct`s with time added between them; and the input, by 1 x 1 if need be.

    After He et al., 2016, arXiv 1512.03385.

    Args:
        i: input channels.
        o: output channels.
        time: width of the time embedding.
        act: name of the activation.
        groups: groups of the norms.
    """

    def __init__(self, i: int, o: int, time: int, act: str, groups: int = 8) -> None:
        super().__init__()
        self.mlp = nn.Sequential(activation(act, "network.act"), nn.Linear(time, o))
        self.block1 = ConvNormAct(i, o, groups, act)
        self.block2 = ConvNormAct(o, o, groups, act)
        self.res_conv = nn.Identity() if i == o else nn.Conv2d(i, o, 1)

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:  # noqa: D102
        h = self.block1(x)
        if time is not None:
            h = h + self.mlp(time)[:, :, None, None]
        out: Tensor = self.block2(h) + self.res_conv(x)
        return out


class Normed(nn.Module):
    """A layer with a group norm of one group before it or behind it: f(norm(x)) or norm(f(x))."""

    def __init__(self, fn: nn.Module, c: int, order: NormOrder) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.GroupNorm(1, c)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.fn(self.norm(x)) if self.order == "pre" else self.norm(self.fn(x))
        return out


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = x + self.fn(x)
        return out


class AnnotatedUNet(DenoisingNetwork):
    """A U-Net whose blocks, attention, norm order and activation are chosen by name.

    Level k has the resolution img_size / 2^k and dim * dim_mults[k] channels. Going down, a level has two blocks,
    attention, and a strided convolution; the middle two blocks with attention between them; going up, a level takes
    the features of the same resolution in, has two blocks and attention, and doubles the resolution. The features of
    level 0 are not taken in, as published. Time enters every block, except the last one before the output.

    With dim 64 and dim_mults (1, 2, 4) these are the networks of seed 004, with its parameter names:

        ==========================================  ==========
        block convnext, attention linear, full      14,908,925
        block convnext, no attention                14,446,205
        block resnet, attention linear, full         8,260,171
        ==========================================  ==========

    Activation and norm order have no parameters, so a state dict does not tell them: weights from elsewhere need to be
    given both.

    Args:
        T: number of steps; the network is given the index k - 1 of the schedule's entry k, as published.
        img_ch: image channels.
        img_size: image height and width, a multiple of 2^(levels - 1).
        dim: channels of level 0 and width of the sinusoidal features of time; even.
        dim_mults: channels of each level in units of `dim`.
        block: convnext or resnet.
        attention: of each level: linear, full or null for none.
        middle_attention: of the middle.
        norm: pre or post: where the attention layers are normalised.
        act: activation of the blocks: gelu, silu or relu.
        time_act: activation between the two layers that time passes first.
        c_embed_dim: width of a condition, which is added to the embedding of time; 0 for none.

    Raises:
        AntherError: an impossible size or an unknown name.

    Reference: Rogge and Rasul, 2022, "The Annotated Diffusion Model", after Ho et al., 2020, arXiv 2006.11239.
    """

    bottleneck = "mid_block2"

    def __init__(
        self,
        T: int,
        img_ch: int,
        img_size: int,
        dim: int = 64,
        dim_mults: Sequence[int] = (1, 2, 4),
        block: Literal["convnext", "resnet"] = "convnext",
        attention: Sequence[Attention | None] = ("linear", "linear", "linear"),
        middle_attention: Attention | None = "full",
        norm: NormOrder = "pre",
        act: str = "gelu",
        time_act: str = "gelu",
        c_embed_dim: int = 0,
    ) -> None:
        super().__init__(T, img_ch, img_size, c_embed_dim)
        levels = len(dim_mults)
        _check(img_size, dim, levels, block, [*attention, middle_attention], norm)
        first, *widths = dim // 3 * 2, *(dim * mult for mult in dim_mults)
        time = 4 * dim
        make = partial(ConvNextBlock if block == "convnext" else ResnetBlock, time=time, act=act)

        def attend(kind: Attention | None, c: int) -> list[nn.Module]:
            return [] if kind is None else [Residual(Normed(ATTENTION[kind](c), c, norm))]

        self.dim = dim
        self.init_conv = nn.Conv2d(img_ch, first, 7, padding=3)
        # The features of time themselves have no parameters; the empty place keeps the published names.
        self.time_mlp = nn.Sequential(
            nn.Identity(), nn.Linear(dim, time), activation(time_act, "network.time_act"), nn.Linear(time, time)
        )
        if c_embed_dim:
            self.c_embed = nn.Linear(c_embed_dim, time, bias=False)
        self.downs = nn.ModuleList()
        for k, (i, o) in enumerate(zip([first, *widths[:-1]], widths, strict=True)):
            resample = nn.Identity() if k == levels - 1 else nn.Conv2d(o, o, 4, 2, 1)
            self.downs.append(nn.ModuleList([make(i, o), make(o, o), *attend(attention[k], o), resample]))
        self.mid_block1 = make(widths[-1], widths[-1])
        self.mid_attn = nn.Sequential() if middle_attention is None else attend(middle_attention, widths[-1])[0]
        self.mid_block2 = make(widths[-1], widths[-1])
        self.ups = nn.ModuleList()
        for k in range(levels - 1, 0, -1):
            i, o = widths[k], widths[k - 1]
            stage = [make(2 * i, o), make(o, o), *attend(attention[k], o), nn.ConvTranspose2d(o, o, 4, 2, 1)]
            self.ups.append(nn.ModuleList(stage))
        last = make(widths[0], widths[0])
        # Published, counted and never called; without a gradient, DDP would wait for one.
        last.mlp.requires_grad_(False)
        self.final_conv = nn.Sequential(last, nn.Conv2d(widths[0], img_ch, 1))

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The network's output for x_t (B, img_ch, img_size, img_size) at t (B,) in (0, 1], cond (B, c_embed_dim).

        Raises:
            AntherError: images or conditions of another shape.
        """
        self.check_images(x_t)
        cond = self.condition(cond, len(x_t), x_t)
        time = self.time_mlp(sinusoidal(self.index(t).float(), self.dim).to(x_t.dtype))
        if self.c_embed_dim:
            time = time + self.c_embed(cond)
        x, skips = self.init_conv(x_t), []
        for stage in self.downs:
            first, second, *attention, resample = _parts(stage)
            x = second(first(x, time), time)
            for layer in attention:
                x = layer(x)
            skips.append(x)
            x = resample(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, time)), time)
        for stage in self.ups:
            first, second, *attention, resample = _parts(stage)
            x = second(first(torch.cat([x, skips.pop()], 1), time), time)
            for layer in attention:
                x = layer(x)
            x = resample(x)
        last, to_image = self.final_conv
        output: Tensor = to_image(last(x, None))
        return output


def _parts(stage: nn.Module) -> list[nn.Module]:
    assert isinstance(stage, nn.ModuleList)
    return list(stage)


def _check(img_size: int, dim: int, levels: int, block: str, attention: Sequence[Attention | None], norm: str) -> None:
    if levels < 1 or img_size < 1 or img_size % 2 ** (levels - 1):
        raise AntherError(
            f"network.dim_mults has {levels} levels, so network.img_size = {img_size} must divide by "
            f"{2 ** max(0, levels - 1)}."
        )
    if dim < 8 or dim % 8:
        raise AntherError(f"network.dim = {dim} must be a multiple of 8.")
    if block not in ("convnext", "resnet"):
        raise AntherError(f"unknown network.block {block!r}: choose convnext or resnet.")
    if len(attention) != levels + 1:
        raise AntherError(f"network.attention has {len(attention) - 1} entries for {levels} levels: give one each.")
    if unknown := [kind for kind in attention if kind is not None and kind not in ATTENTION]:
        raise AntherError(f"unknown attention {unknown[0]!r}: choose linear, full or null.")
    if norm not in ("pre", "post"):
        raise AntherError(f"unknown network.norm {norm!r}: choose pre or post.")
