"""The one image range: float in [-1, 1] inside, uint8 in files and metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from torch import Tensor

from diffusion.errors import AntherError
from diffusion.files import atomic

if TYPE_CHECKING:
    from PIL import Image


def to_uint8(images: Tensor) -> Tensor:
    """Maps [-1, 1] to 0..255: clamped, then rounded to the nearest level."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Maps 0..255 to float32 in [-1, 1]; the inverse of `to_uint8` on its image."""
    return images.float().div(127.5).sub(1)


def check_finite(images: Tensor, names: Sequence[str]) -> None:
    """Refuses drawn images that would be saved as black ones.

    Args:
        images: (N, C, H, W).
        names: of the images.

    Raises:
        AntherError: one holds NaN or infinity.
    """
    for name, image in zip(names, images, strict=True):
        if not image.isfinite().all():
            raise AntherError(
                f"image {name} holds numbers that are not finite, so the model has diverged: use an earlier "
                "checkpoint, a smaller guidance.weight, or trainer.precision=32."
            )


def to_pil(image: Tensor) -> "Image.Image":
    """One image (C, H, W) in [-1, 1], C = 1 or 3, as a PIL image of mode L or RGB."""
    from PIL import Image

    pixels: np.ndarray = to_uint8(image.detach().cpu()).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def grid(images: Tensor, columns: int, padding: int = 2, scale: int = 1) -> Tensor:
    """Lays (N, C, H, W) out row by row as one image (C, H', W'), white between the cells.

    Args:
        images: values in [-1, 1].
        columns: images per row.
        padding: pixels between and around the cells.
        scale: each pixel is repeated this often in both directions, so that small images can be looked at.
    """
    images = images.detach().float().cpu()
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    n, c, h, w = images.shape
    rows = -(-n // columns)
    sheet = torch.ones(c, rows * (h + padding) + padding, columns * (w + padding) + padding)
    for k, image in enumerate(images):
        top = padding + (k // columns) * (h + padding)
        left = padding + (k % columns) * (w + padding)
        sheet[:, top : top + h, left : left + w] = image
    return sheet


def sheet(images: Tensor, captions: Sequence[str], columns: int, scale: int = 4) -> "Image.Image":
    """A grid with a caption under each image, for people to look at.

    Args:
        images: (N, C, H, W) in [-1, 1].
        captions: one per image; long ones are broken into lines, and never within "w = 0".
        columns: images per row.
        scale: magnification, by repetition of pixels.
    """
    from textwrap import wrap

    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=12)
    height, width = images.shape[2] * scale, images.shape[3] * scale
    # No line is broken at a no-break space, and the font has none: after the breaks it is a space again.
    kept = [wrap(caption.replace(" = ", "\xa0=\xa0"), max(8, width // 7)) for caption in captions]
    lines = [[line.replace("\xa0", " ") for line in part] for part in kept]
    text_height = 15 * max(map(len, lines), default=0) + 4
    rows, gap = -(-len(images) // columns), 6
    page = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + text_height + gap) + gap), "white")
    draw = ImageDraw.Draw(page)
    for k, image in enumerate(images):
        left, top = gap + (k % columns) * (width + gap), gap + (k // columns) * (height + text_height + gap)
        page.paste(to_pil(image).resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.multiline_text((left, top + height + 2), "\n".join(lines[k]), fill="black", font=font, spacing=3)
    return page


def save_png(image: Tensor, path: Path | str) -> None:
    """Writes one image (C, H, W) in [-1, 1] as a lossless PNG."""
    with atomic(path) as temporary:
        to_pil(image).save(temporary, format="PNG")


class PngFiles:
    """Files that `save_png` wrote, read when they are asked for: what a tensor uint8 (N, C, H, W) is to its reader.

    Args:
        paths: one or more, all of one size.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self.shape = (len(self._paths), *read_pngs(self._paths[:1]).shape[1:])

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: "int | slice") -> Tensor: ...

    @overload
    def __getitem__(self, index: "Sequence[int] | np.ndarray") -> "PngFiles": ...

    def __getitem__(self, index: "int | slice | Sequence[int] | np.ndarray") -> "Tensor | PngFiles":
        """One image, consecutive ones, or a choice of the files, which is not read yet."""
        if isinstance(index, int):
            return read_pngs([self._paths[index]])[0]
        if isinstance(index, slice):
            return read_pngs(self._paths[index])
        return PngFiles([self._paths[k] for k in index])


class TableRows:
    """Rows of a data table, read when they are asked for: what a tensor uint8 (N, C, H, W) is to its reader.

    Args:
        images: uint8 (M, C, H', W') of the table, which may be a memory map larger than memory.
        rows: N of them.
        size: height and width of the centre that is wanted.
    """

    def __init__(self, images: np.ndarray, rows: np.ndarray, size: int) -> None:
        self._images, self._rows, self._size = images, rows, size
        self.shape = (len(rows), images.shape[1], size, size)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: "int | slice") -> Tensor: ...

    @overload
    def __getitem__(self, index: "Sequence[int] | np.ndarray") -> "TableRows": ...

    def __getitem__(self, index: "int | slice | Sequence[int] | np.ndarray") -> "Tensor | TableRows":
        """One image, consecutive ones, or a choice of the rows, which is not read yet."""
        if isinstance(index, int | slice):
            return centre_crop(torch.from_numpy(np.array(self._images[self._rows[index]])), self._size)
        return TableRows(self._images, self._rows[np.asarray(index, np.int64)], self._size)


def centre_crop(pixels: Tensor, size: int) -> Tensor:
    """The central (size, size) of (..., H, W)."""
    top, left = (pixels.shape[-2] - size) // 2, (pixels.shape[-1] - size) // 2
    return pixels[..., top : top + size, left : left + size]


Images = Tensor | PngFiles | TableRows
"""uint8 (N, C, H, W), in memory, in files or in a table: `len(images)`, `images.shape`, `images[7]`, `images[8:16]`."""


def read_pngs(paths: Sequence[Path]) -> Tensor:
    """The images that `save_png` wrote, as uint8 (N, C, H, W), C = 1 or 3; one or more, all of one size.

    Raises:
        AntherError: one is missing or damaged.
    """
    from PIL import Image

    rows = []
    for path in paths:
        try:
            with Image.open(path) as image:
                pixels = np.array(image)
        except OSError as error:
            raise AntherError(f"{path} cannot be read: delete it and run the same command again.") from error
        rows.append(torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1))
    return torch.stack(rows)


def save_gif(frames: Sequence[Tensor], path: Path | str, ms: int = 60, last_ms: int = 2000) -> None:
    """Writes frames (C, H, W) in [-1, 1] as an endless GIF.

    Args:
        frames: at least one frame.
        path: the file.
        ms: how long a frame stays, in milliseconds.
        last_ms: how long the last one stays.
    """
    pictures = [to_pil(frame) for frame in frames]
    durations = [ms] * (len(pictures) - 1) + [last_ms]
    with atomic(path) as temporary:
        pictures[0].save(
            temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, disposal=1
        )
