"""The modern default: the U-Net of "Diffusion Models Beat GANs", the ADM."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from diffusion.errors import AntherError
from diffusion.networks.base import DenoisingNetwork
from diffusion.networks.blocks import sinusoidal
from diffusion.networks.residual import (
    GROUPS,
    AttentionBlock,
    Middle,
    Resample,
    ResidualBlock,
    Stage,
    check_channels,
    zeroed,
)


class ADM(DenoisingNetwork):
    """Residual blocks with adaptive group norm, and attention at chosen resolutions.

    Level k has the resolution img_size / 2^k and channels * channel_mult[k] channels: `num_blocks` residual blocks
    going down and one more going up, where each takes in the features that the way down left behind. Blocks halve and
    double the resolution themselves. Time and condition are added to one embedding, which scales and shifts the second
    norm of every block. The last layer begins at zero, so an untrained network gives zeros.

    Parameter names and forward pass are those of diffusers' `UNet2DModel` with `resnet_time_scale_shift="scale_shift"`
    and down- and upsampling by blocks.

    Args:
        T: number of steps; the network is given the index k - 1 of the schedule's entry k.
        img_ch: image channels.
        img_size: image height and width, a multiple of 2^(levels - 1).
        channels: unit of the channels, a multiple of 32.
        channel_mult: channels of each level in units of `channels`. Those of level 0 are also the number of
            sinusoidal features of time, and a quarter of their embedding.
        num_blocks: residual blocks per level.
        attention_resolutions: in pixels: levels of these resolutions have attention behind every block. The middle
            always has.
        head_channels: channels per attention head.
        dropout: inside the blocks.
        c_embed_dim: width of a condition; 0 for none. One-hot classes make its layer the published table of classes.

    Raises:
        AntherError: an impossible size.

    Reference: Dhariwal and Nichol, 2021, arXiv 2105.05233; the sizes for CIFAR-10 are from Nichol and Dhariwal, 2021,
    arXiv 2102.09672.
    """

    bottleneck = "mid_block"

    def __init__(
        self,
        T: int,
        img_ch: int,
        img_size: int,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        head_channels: int = 64,
        dropout: float = 0.0,
        c_embed_dim: int = 0,
    ) -> None:
        super().__init__(T, img_ch, img_size, c_embed_dim)
        check_channels(channels, channel_mult, img_size)
        widths = [channels * mult for mult in channel_mult]
        resolutions = [img_size // 2**k for k in range(len(widths))]
        attending = [r in attention_resolutions for r in resolutions]
        if unknown := [r for r in attention_resolutions if r not in resolutions]:
            raise AntherError(
                f"network.attention_resolutions has {unknown[0]}, and the network works at "
                f"{', '.join(map(str, resolutions))} pixels: choose from these."
            )
        if num_blocks < 1:
            raise AntherError(f"network.num_blocks = {num_blocks} must be 1 or more.")
        with_heads = {w for w, yes in zip(widths, attending, strict=True) if yes} | {widths[-1]}
        if head_channels < 1 or any(w % head_channels for w in with_heads):
            raise AntherError(
                f"network.head_channels = {head_channels} must divide the channels where there is attention, "
                f"{', '.join(map(str, sorted(with_heads)))}."
            )
        first = widths[0]
        time = 4 * first

        def block(i: int, o: int, resample: Resample = None) -> ResidualBlock:
            return ResidualBlock(i, o, time, dropout, resample=resample)

        def attentions(level: int, count: int) -> list[AttentionBlock]:
            width = widths[level]
            return [AttentionBlock(width, width // head_channels) for _ in range(count * attending[level])]

        self.first = first
        self.conv_in = nn.Conv2d(img_ch, first, 3, padding=1)
        self.time_embedding = TimeEmbedding(first, time)
        if c_embed_dim:
            self.c_embed = nn.Linear(c_embed_dim, time, bias=False)
        last = len(widths) - 1
        skips = [first]  # channels of what the way down leaves behind
        self.down_blocks = nn.ModuleList()
        for level, o in enumerate(widths):
            inputs = [skips[-1], *[o] * (num_blocks - 1)]
            down = [] if level == last else [block(o, o, "down")]
            stage = Stage([block(i, o) for i in inputs], attentions(level, num_blocks), downsamplers=down)
            self.down_blocks.append(stage)
            skips += [o] * (num_blocks + len(down))
        self.mid_block = Middle(widths[-1], widths[-1] // head_channels, time, dropout)
        self.up_blocks = nn.ModuleList()
        current = widths[-1]
        for level in range(last, -1, -1):
            o = widths[level]
            blocks = []
            for _ in range(num_blocks + 1):
                blocks.append(block(current + skips.pop(), o))
                current = o
            up = [] if level == 0 else [block(o, o, "up")]
            self.up_blocks.append(Stage(blocks, attentions(level, num_blocks + 1), upsamplers=up))
        self.conv_norm_out = nn.GroupNorm(GROUPS, first)
        self.conv_out = zeroed(nn.Conv2d(first, img_ch, 3, padding=1))

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The network's output for x_t (B, img_ch, img_size, img_size) at t (B,) in (0, 1], cond (B, c_embed_dim).

        Raises:
            AntherError: images or conditions of another shape.
        """
        self.check_images(x_t)
        cond = self.condition(cond, len(x_t), x_t)
        time = self.time_embedding(sinusoidal(self.index(t).float(), self.first).to(x_t.dtype))
        if self.c_embed_dim:
            time = time + self.c_embed(cond)
        x = self.conv_in(x_t)
        skips = [x]
        for stage in self.down_blocks:
            assert isinstance(stage, Stage)
            for k in range(len(stage.resnets)):
                x = stage.block(k, x, time)
                skips.append(x)
            for down in stage.downsamplers:
                x = down(x, time)
                skips.append(x)
        x = self.mid_block(x, time)
        for stage in self.up_blocks:
            assert isinstance(stage, Stage)
            for k in range(len(stage.resnets)):
                x = stage.block(k, torch.cat([x, skips.pop()], 1), time)
            for up in stage.upsamplers:
                x = up(x, time)
        output: Tensor = self.conv_out(silu(self.conv_norm_out(x)))
        return output


class TimeEmbedding(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(i, o), nn.Linear(o, o)

    def forward(self, features: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.linear_2(silu(self.linear_1(features)))
        return out
