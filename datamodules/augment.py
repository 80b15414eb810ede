"""Augmentation on the fly: pure functions of pixels and of the uniforms that they are given."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from diffusion.errors import AntherError
from diffusion.images import from_uint8


class Augment(ABC):
    """Maps table pixels to training images.

    Attributes:
        draws: how many uniforms an image takes.
        width: A, the number of labels it reports per image; 0 where it reports none.
    """

    draws: int
    width: int = 0

    @abstractmethod
    def __call__(self, pixels: Tensor, uniforms: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
        """Augments a batch.

        Args:
            pixels: uint8 (B, C, H, W), H and W at least `size`.
            uniforms: float64 (B, draws) in [0, 1); image k depends on row k alone.
            size: height and width of the result.

        Returns:
            Images float32 (B, C, size, size) in [-1, 1], and float32 (B, width) or None.
        """


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise AntherError(f"augment.{name} = {value} is a probability: choose it in [0, 1].")


class FlipCrop(Augment):
    """A mirror image now and then, and a random crop of what the table holds beyond `size`.

    Decode a margin (`data.short_side` above `data.size`) to have something to crop; the aspect never changes.

    Args:
        flip: probability of a mirror image.
    """

    draws = 3

    def __init__(self, flip: float = 0.5) -> None:
        _check_share("flip", flip)
        self.flip = flip

    def __call__(self, pixels: Tensor, uniforms: Tensor, size: int) -> tuple[Tensor, None]:
        """See `Augment`."""
        if (height := pixels.shape[-2]) > size or pixels.shape[-1] > size:
            top = (uniforms[:, 1] * (height - size + 1)).long()
            left = (uniforms[:, 2] * (pixels.shape[-1] - size + 1)).long()
            # (B, C, tops, lefts, size, size), a view: the index copies the one window of each image.
            windows = pixels.unfold(2, size, 1).unfold(3, size, 1)
            pixels = windows[torch.arange(len(pixels)), :, top, left]
        mirrored = (uniforms[:, 0] < self.flip)[:, None, None, None]
        return from_uint8(torch.where(mirrored, pixels.flip(-1), pixels)), None


class NonLeaking(Augment):
    """Geometric augmentation that the network is told about, for small data sets.

    Each transformation is applied with probability `p` and its parameters are reported as labels, zeros meaning none,
    so that the network draws plain images when it is given zeros: Karras et al. 2022, arXiv 2206.00364, appendix F.2.
    The anisotropic scaling of the paper is left out, since it changes the aspect. Labels, in this order: mirrored
    (0 or 1), upside down (0 or 1), log2 scale / 0.2, cos(angle) - 1, sin(angle), shift right and shift down in
    eighths of the image.

    Args:
        p: probability of each transformation except the mirror image, which has one half as in the paper.
        upside_down: whether to turn images upside down at all.
    """

    draws = 10
    width = 7
    SCALE: ClassVar[float] = 0.2
    SHIFT: ClassVar[float] = 0.125

    def __init__(self, p: float = 0.12, upside_down: bool = False) -> None:
        _check_share("p", p)
        self.p, self.upside_down = p, upside_down

    def __call__(self, pixels: Tensor, uniforms: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """See `Augment`."""
        labels = self.labels(uniforms)
        top, left = (pixels.shape[-2] - size) // 2, (pixels.shape[-1] - size) // 2
        images = from_uint8(pixels[..., top : top + size, left : left + size])
        moved = (labels != 0).any(1)
        if moved.any():
            images[moved] = warp(images[moved], labels[moved], self.SCALE, self.SHIFT)
        return images, labels

    def labels(self, uniforms: Tensor) -> Tensor:
        """The parameters (B, 7) that (B, 10) uniforms choose."""
        on = uniforms[:, :4] < self.p
        mirrored = uniforms[:, 4] < 0.5
        down = on[:, 0] & (uniforms[:, 5] < 0.5) & self.upside_down
        # 1e-12 keeps the tails finite; |z| stays below 7.1.
        normal = torch.special.ndtri(uniforms[:, [6, 8, 9]].clamp(1e-12, 1 - 1e-12))
        scale = torch.where(on[:, 1], normal[:, 0], 0.0)
        angle = torch.where(on[:, 2], (2 * uniforms[:, 7] - 1) * math.pi, 0.0)
        shift = torch.where(on[:, 3:4], normal[:, 1:], 0.0)
        columns = [mirrored, down, scale, angle.cos() - 1, angle.sin(), shift[:, 0], shift[:, 1]]
        return torch.stack([column.double() for column in columns], 1).float()


class Affine(Augment):
    """A small turn, scaling and shift of every image, of which the network is not told: for classifiers.

    Args:
        degrees: largest angle either way.
        scale: largest change of size, as a share of it.
        shift: largest move right or down, either way, as a share of the image.
    """

    draws = 4

    def __init__(self, degrees: float = 10.0, scale: float = 0.1, shift: float = 0.07) -> None:
        self.degrees, self.scale, self.shift = degrees, scale, shift

    def __call__(self, pixels: Tensor, uniforms: Tensor, size: int) -> tuple[Tensor, None]:
        """See `Augment`."""
        top, left = (pixels.shape[-2] - size) // 2, (pixels.shape[-1] - size) // 2
        images = from_uint8(pixels[..., top : top + size, left : left + size])
        signed = 2 * uniforms - 1
        angle = signed[:, 0] * math.radians(self.degrees)
        factor = (signed[:, 1] * self.scale + 1).log2()
        zeros = torch.zeros_like(angle)
        labels = [zeros, zeros, factor, angle.cos() - 1, angle.sin(), signed[:, 2], signed[:, 3]]
        return warp(images, torch.stack(labels, 1), 1.0, self.shift), None


def warp(images: Tensor, labels: Tensor, scale_step: float, shift_step: float) -> Tensor:
    """Applies labels of `NonLeaking`: mirrored, then scaled, turned counter-clockwise, and shifted.

    Sampling is bicubic with reflected borders. Values stay in [-1, 1].
    """
    labels = labels.double()
    factor = torch.exp2(labels[:, 2] * scale_step)
    cos, sin = labels[:, 3] + 1, labels[:, 4]
    across, along = 1 - 2 * labels[:, 0], 1 - 2 * labels[:, 1]
    # grid_sample asks where a pixel comes from, so this is the inverse map, in coordinates of [-1, 1], y downwards.
    shift = 2 * shift_step * labels[:, 5:7]
    linear = (
        torch.stack([torch.stack([cos * across, -sin * across], 1), torch.stack([sin * along, cos * along], 1)], 1)
        / factor[:, None, None]
    )
    offset = -(linear @ shift[:, :, None])
    grid = affine_grid(torch.cat([linear, offset], 2).float(), list(images.shape), align_corners=False)
    warped = grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return warped.clamp(-1, 1)
