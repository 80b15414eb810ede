"""Image-to-image and inpainting: where a sampler's walk begins, and what each step of it is held to."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusion.devices import upload
from diffusion.errors import AntherError
from diffusion.images import from_uint8
from diffusion.samplers import Project
from diffusion.schedules import Schedule

STRENGTH = 0.6
"""Of image-to-image, unless told."""


def diffuse(schedule: Schedule, image: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t eps; at t = 0 the image to the bit.

    Args:
        schedule: signal and noise levels.
        image: x_0, (C, H, W), on the device of the noise.
        t: time, float64 scalar on the host.
        noise: eps, (B, C, H, W).

    Returns:
        (B, C, H, W).
    """
    alpha, sigma = schedule(t)
    return alpha.item() * image + sigma.item() * noise


@dataclass(frozen=True)
class Edit:
    """An image that is drawn anew, in part or as a whole.

    Without a mask this is image-to-image as SDEdit has it (Meng et al., 2021, arXiv 2108.01073): the image is diffused
    to t = strength, and the sampler goes on from there. At strength 1 it starts from noise alone, also on a schedule
    that keeps some signal at t = 1, so that the image has no say.

    With a mask it is inpainting by replacement (Lugmayr et al., 2022, arXiv 2201.09865, without their resampling): what
    is kept of x_s is, at the beginning and after every step, the image diffused to s,

        x_s <- drawn x_s + (1 - drawn) (alpha_s image + sigma_s eps)

    Each image has one eps, the noise that it starts from. The paper draws a new one in every step; with one, samplers
    without noise stay so, and solvers with a memory see no jumps.

    Attributes:
        image: (C, H, W) in [-1, 1].
        strength: where the walk begins, in [0, 1]; 0 gives the image back.
        drawn: (H, W), true where the image is drawn anew; None is everywhere.

    Raises:
        AntherError: a strength outside [0, 1], or a mask that leaves nothing to draw.
    """

    image: Tensor
    strength: float = STRENGTH
    drawn: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise AntherError(
                f"strength lies in [0, 1], not at {self.strength}: 0 gives the image back, 1 starts from noise."
            )
        if self.drawn is not None and not self.drawn.any():
            raise AntherError(
                "the mask, fitted to the model, is black all over, and black is kept: make white what is to be drawn "
                "anew."
            )

    def begin(self, schedule: Schedule, noise: Tensor) -> tuple[Tensor, float, Project | None]:
        """What a sampler needs to know.

        Args:
            schedule: of the model.
            noise: standard normal, (B, C, H, W), the first draw of each image's own stream.

        Returns:
            The images at t = strength, (B, C, H, W), that time, and what the walk is held to, None without a mask.

        Raises:
            AntherError: a strength above 0 and below 1 / T, where no network was trained.
        """
        if 0 < self.strength < 1 / schedule.T:
            raise AntherError(
                f"strength = {self.strength} is less than 1 / {schedule.T}, the first step of the model's schedule: "
                "set more, or 0, which gives the image back."
            )
        t = torch.tensor(self.strength, dtype=torch.float64)
        image = upload(self.image, noise.device, noise.dtype)
        x_t = noise if self.strength == 1 else diffuse(schedule, image, t, noise)
        if self.drawn is None:
            return x_t, self.strength, None
        drawn = upload(self.drawn, noise.device)

        def project(x_s: Tensor, s: Tensor) -> Tensor:
            return torch.where(drawn, x_s, diffuse(schedule, image, s, noise))

        return project(x_t, t), self.strength, project


def read_edit(image: str | None, mask: str | None, strength: float | None, side: int, channels: int) -> Edit | None:
    """What a user asks for by files, fitted to a model as the data of a training are.

    Args:
        image: path; None where nothing is edited.
        mask: path of an image of the same size, white where it is drawn anew, black where it is kept; or None.
        strength: see `Edit`; None is 1 with a mask and `STRENGTH` without.
        side: of the model's images, in pixels.
        channels: of the model's images, 1 or 3.

    Raises:
        AntherError: a mask or a strength without an image, a file that is none or no image, or a mask of another size;
            and what `Edit` refuses.
    """
    if image is None:
        for name, value in (("mask", mask), ("strength", strength)):
            if value is not None:
                raise AntherError(f"{name} = {value} is about an image: set image= to a file, or leave {name}= out.")
        return None
    pixels, size = _fitted("image", image, side, channels)
    if mask is None:
        return Edit(from_uint8(pixels), STRENGTH if strength is None else strength)
    white, masked = _fitted("mask", mask, side, 1)
    if masked != size:
        sizes = "{} x {} pixels and the image {} x {}".format(*masked, *size)
        raise AntherError(f"the mask {mask} has {sizes}: make a mask of the image's size.")
    return Edit(from_uint8(pixels), 1.0 if strength is None else strength, white[0] >= 128)


def _fitted(name: str, path: str, side: int, channels: int) -> tuple[Tensor, tuple[int, int]]:
    """uint8 (channels, side, side) of a file, and its width and height."""
    from datamodules.base import open_rgb
    from datamodules.folders import decode_square

    if not Path(path).is_file():
        raise AntherError(f"there is no {name} at {path}: give {name}= the path of an image file.")
    try:
        return torch.tensor(decode_square(Path(path), side, channels)), open_rgb(Path(path)).size
    except MemoryError:
        raise
    # What Pillow raises for damaged files depends on the format.
    except Exception as error:
        raise AntherError(f"{path} cannot be read as an image ({error}): give {name}= an image file.") from error
