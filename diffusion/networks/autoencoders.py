"""Variational autoencoders: that of seed 004, and the convolutional one that latent diffusion works in."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, silu

from diffusion.errors import AntherError
from diffusion.networks.residual import GROUPS, Middle, ResidualBlock, Stage, check_channels


class Posterior(NamedTuple):
    """q(z | x), a Gaussian with independent entries.

    Attributes:
        mean: (B, *latent_shape).
        logvar: of the same shape.
    """

    mean: Tensor
    logvar: Tensor

    def at(self, eps: Tensor) -> Tensor:
        """A draw, mean + sigma eps, where `eps` is standard normal."""
        return self.mean + (0.5 * self.logvar).exp() * eps

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, one value per sample, (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class Autoencoder(nn.Module, ABC):
    """What `modules.autoencoder` trains. Images are (B, C, H, W) in [-1, 1].

    Args:
        image_shape: (C, H, W).
        latent_shape: of one z.

    Attributes:
        bottleneck: name of the submodule whose output stands for an image that was drawn.
    """

    bottleneck: str

    def __init__(self, image_shape: tuple[int, int, int], latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.latent_shape = latent_shape

    @abstractmethod
    def encode(self, images: Tensor) -> Posterior:
        """q(z | x) of images: two tensors (B, *latent_shape).

        Raises:
            AntherError: images of another shape than the network's.
        """

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Images, nominally in [-1, 1], of latents (B, *latent_shape)."""

    def check_images(self, images: Tensor) -> None:
        """Refuses images of another shape.

        Raises:
            AntherError: naming both shapes.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            raise AntherError(
                f"the autoencoder takes images of {' x '.join(map(str, self.image_shape))} and was given "
                f"{' x '.join(map(str, images.shape[1:]))}: make network.img_ch and network.img_size those of the data."
            )


class VAE(Autoencoder):
    """The variational autoencoder of seed 004: 2,957,251 parameters.

    Four strided convolutions down to 4 x 4, one vector of `latent_dim` numbers, and four transposed ones up. The last
    step is a sigmoid, so pixels may be read as probabilities: `logits` are what is in front of it. Parameter names are
    the published ones.

    Args:
        img_ch: image channels.
        img_size: image height and width, a multiple of 16.
        latent_dim: numbers in z.
        channels: of the four levels.

    Raises:
        AntherError: an impossible size.

    Reference: Kingma and Welling, 2014, arXiv 1312.6114.
    """

    bottleneck = "decoder_input"

    def __init__(
        self, img_ch: int = 3, img_size: int = 64, latent_dim: int = 128, channels: Sequence[int] = (32, 64, 128, 256)
    ) -> None:
        super().__init__((img_ch, img_size, img_size), (latent_dim,))
        factor = 2 ** len(channels)
        if not channels or img_size < factor or img_size % factor:
            raise AntherError(
                f"network.channels has {len(channels)} levels, so network.img_size = {img_size} must divide by "
                f"{factor}."
            )
        if latent_dim < 1:
            raise AntherError(f"network.latent_dim = {latent_dim} must be 1 or more.")
        side = img_size // factor
        self._map = (channels[-1], side, side)
        width = channels[-1] * side**2
        down: list[nn.Module] = []
        for i, o in zip([img_ch, *channels], channels, strict=False):
            down += [nn.Conv2d(i, o, 4, 2, 1), nn.ReLU()]
        self.encoder = nn.Sequential(*down, nn.Flatten())
        self.fc_mu = nn.Linear(width, latent_dim)
        self.fc_var = nn.Linear(width, latent_dim)
        self.decoder_input = nn.Linear(latent_dim, width)
        up: list[nn.Module] = []
        backward = list(reversed(channels))
        for i, o in zip(backward, [*backward[1:], img_ch], strict=True):
            up += [nn.ConvTranspose2d(i, o, 4, 2, 1), nn.ReLU()]
        self.decoder = nn.Sequential(*up[:-1])

    def encode(self, images: Tensor) -> Posterior:
        """See `Autoencoder`."""
        self.check_images(images)
        features = self.encoder((images + 1) / 2)
        return Posterior(self.fc_mu(features), self.fc_var(features))

    def logits(self, z: Tensor) -> Tensor:
        """Log-odds of pixels in [0, 1], (B, C, H, W), of z (B, latent_dim)."""
        logits: Tensor = self.decoder(self.decoder_input(z).unflatten(1, self._map))
        return logits

    def decode(self, z: Tensor) -> Tensor:
        """See `Autoencoder`."""
        return 2 * self.logits(z).sigmoid() - 1


class AutoencoderKL(Autoencoder):
    """The convolutional autoencoder of latent diffusion: residual blocks, attention in the middle, a map as latent.

    Level k has the resolution img_size / 2^k, so an image of 64 pixels and four levels makes a latent of 8 x 8.
    Parameter names and forward pass are those of diffusers' `AutoencoderKL`, whose published weights load.

    Args:
        img_ch: image channels.
        img_size: image height and width, a multiple of 2^(levels - 1).
        channels: of level 0, a multiple of 32.
        channel_mult: channels of each level in units of `channels`; two levels or more.
        num_blocks: residual blocks per level of the encoder; the decoder has one more.
        latent_ch: channels of the latent.

    Raises:
        AntherError: an impossible size.

    Reference: Rombach et al., 2022, arXiv 2112.10752.
    """

    bottleneck = "decoder.mid_block"

    def __init__(
        self,
        img_ch: int = 3,
        img_size: int = 64,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_blocks: int = 2,
        latent_ch: int = 4,
    ) -> None:
        check_channels(channels, channel_mult, img_size, least=2)
        if num_blocks < 1 or latent_ch < 1:
            raise AntherError(
                f"network.num_blocks = {num_blocks} and network.latent_ch = {latent_ch} must be 1 or more."
            )
        widths = [channels * mult for mult in channel_mult]
        side = img_size // 2 ** (len(widths) - 1)
        super().__init__((img_ch, img_size, img_size), (latent_ch, side, side))
        self.encoder = Encoder(img_ch, widths, num_blocks, 2 * latent_ch)
        self.decoder = Decoder(latent_ch, widths[::-1], num_blocks + 1, img_ch)
        self.quant_conv = nn.Conv2d(2 * latent_ch, 2 * latent_ch, 1)
        self.post_quant_conv = nn.Conv2d(latent_ch, latent_ch, 1)

    def encode(self, images: Tensor) -> Posterior:
        """See `Autoencoder`; log-variances are kept in [-30, 20]."""
        self.check_images(images)
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, 1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def decode(self, z: Tensor) -> Tensor:
        """See `Autoencoder`."""
        images: Tensor = self.decoder(self.post_quant_conv(z))
        return images


EPS = 1e-6  # of the norms, as published


class Encoder(nn.Module):
    """Images to maps of `o` channels, a level of resolution for each width."""

    def __init__(self, img_ch: int, widths: Sequence[int], num_blocks: int, o: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(img_ch, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, (i, width) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True)):
            blocks = [ResidualBlock(c, width, eps=EPS) for c in [i, *[width] * (num_blocks - 1)]]
            down = [] if level == len(widths) - 1 else [Halve(width)]
            self.down_blocks.append(Stage(blocks, downsamplers=down))
        self.mid_block = Middle(widths[-1], heads=1, eps=EPS)
        self.conv_norm_out = nn.GroupNorm(GROUPS, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], o, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        x = _through(self.down_blocks, self.conv_in(images))
        out: Tensor = self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))
        return out


class Decoder(nn.Module):
    """Maps of `latent_ch` channels to images, a level of resolution for each width."""

    def __init__(self, latent_ch: int, widths: Sequence[int], num_blocks: int, img_ch: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent_ch, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], heads=1, eps=EPS)
        self.up_blocks = nn.ModuleList()
        for level, (i, width) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True)):
            blocks = [ResidualBlock(c, width, eps=EPS) for c in [i, *[width] * (num_blocks - 1)]]
            up = [] if level == len(widths) - 1 else [Double(width)]
            self.up_blocks.append(Stage(blocks, upsamplers=up))
        self.conv_norm_out = nn.GroupNorm(GROUPS, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], img_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # noqa: D102
        x = _through(self.up_blocks, self.mid_block(self.conv_in(z)))
        out: Tensor = self.conv_out(silu(self.conv_norm_out(x)))
        return out


class Halve(nn.Module):
    """A strided convolution, padded on the right and below as published."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.conv(pad(x, (0, 1, 0, 1)))
        return out


class Double(nn.Module):
    """Pixels repeated, then a convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def _through(stages: nn.ModuleList, x: Tensor) -> Tensor:
    for stage in stages:
        assert isinstance(stage, Stage)
        for k in range(len(stage.resnets)):
            x = stage.block(k, x)
        for resample in [*stage.downsamplers, *stage.upsamplers]:
            x = resample(x)
    return x
