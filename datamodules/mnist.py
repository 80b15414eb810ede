"""MNIST, all 70,000, through the resolver or from a folder of IDX files."""

import gzip
import hashlib
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.augment import Augment
from datamodules.base import Array, ImageDataModule, ImageTable, content_digest, random_split
from diffusion.assets import ASSETS, resolve
from diffusion.errors import AntherError

# sha256 of the content once decompressed, so that a file counts in whatever way it was packed.
_CONTENT = {
    "mnist/train-images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "mnist/train-labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "mnist/t10k-images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "mnist/t10k-labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class MNIST(ImageDataModule):
    """Handwritten digits (LeCun, Cortes and Burges, 1998): 1x28x28, ten classes.

    The 60,000 training images are split into "train" and "val"; "test" is the 10,000 of the authors. Captions read
    "the digit 3".

    Args:
        batch_size: see `ImageDataModule`.
        seed: see `ImageDataModule`.
        size: height and width; more than 28 adds a black border.
        path: a folder with the four IDX files, packed or not, itself or its `raw` or `MNIST/raw` (torchvision's
            layout); by default the files are fetched.
        val_batch_size: see `ImageDataModule`.
        drop_last: see `ImageDataModule`.
        num_workers: see `ImageDataModule`.
        augment: see `ImageDataModule`.
        split: fractions of the 60,000.
        split_seed: see `ImageDataModule`.
        balanced: see `ImageDataModule`.
        exclude: see `ImageDataModule`.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        seed: int,
        size: int = 28,
        path: str | None = None,
        val_batch_size: int | None = None,
        drop_last: bool = True,
        num_workers: int = 0,
        augment: Augment | None = None,
        split: Mapping[str, float] | None = None,
        split_seed: int = 42,
        balanced: bool = False,
        exclude: str | None = None,
    ) -> None:
        if size < 28:
            raise AntherError(f"data.size={size}, but MNIST's digits are 28 pixels wide; choose 28 or more.")
        super().__init__(
            name="mnist",
            image_shape=(1, size, size),
            batch_size=batch_size,
            seed=seed,
            val_batch_size=val_batch_size,
            drop_last=drop_last,
            num_workers=num_workers,
            augment=augment,
            split=split,
            split_seed=split_seed,
            balanced=balanced,
            exclude=exclude,
        )
        self.path = path

    @property
    def class_names(self) -> tuple[str, ...]:
        """The digits."""
        return tuple("0123456789")

    @property
    def digits(self) -> Tensor:
        """What the digits really are, int64 (N,); after `setup`."""
        return self.table.labels

    def load(self) -> ImageTable:
        """See `ImageDataModule`."""
        arrays = {name: self._read(name) for name in _CONTENT}
        images = np.concatenate([arrays["mnist/train-images"], arrays["mnist/t10k-images"]])[:, None]
        labels = np.concatenate([arrays["mnist/train-labels"], arrays["mnist/t10k-labels"]]).astype(np.int64)
        before = (self.image_shape[1] - 28) // 2
        after = self.image_shape[1] - 28 - before
        images = np.pad(images, ((0, 0), (0, 0), (before, after), (before, after)))
        digest = content_digest(["mnist", self.image_shape], [images, labels])
        images.setflags(write=False)
        return ImageTable(
            images=images,
            labels=torch.from_numpy(labels),
            class_names=self.class_names,
            names=tuple(f"train/{i:05d}" for i in range(60_000)) + tuple(f"test/{i:05d}" for i in range(10_000)),
            captions=tuple(f"the digit {label}" for label in labels),
            digest=digest,
        )

    def make_splits(self, table: ImageTable) -> dict[str, Array]:
        """See `ImageDataModule`; the test images of the authors are in no other split."""
        if "test" in self.split:
            raise AntherError("data.split may not name test: MNIST's 10,000 test images are that split.")
        return random_split(60_000, self.split, self.split_seed) | {"test": np.arange(60_000, 70_000)}

    def _read(self, name: str) -> Array:
        stem = Path(ASSETS[name].file).stem
        file = resolve(name) if self.path is None else _local(Path(self.path).expanduser(), stem)
        content = unpacked(file)
        if hashlib.sha256(content).hexdigest() != _CONTENT[name]:
            # What cannot be read at all is told first.
            read_idx(content, file)
            raise AntherError(f"{file} is not MNIST's {stem}: its checksum differs; replace it or leave data.path out.")
        return read_idx(content, file)


def _local(folder: Path, stem: str) -> Path:
    candidates = [folder / inner / (stem + suffix) for inner in ("", "raw", "MNIST/raw") for suffix in (".gz", "")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise AntherError(
        f"{folder} holds no {stem} (nor {stem}.gz, nor in raw/ or MNIST/raw/); correct data.path, or leave it out to "
        "have MNIST fetched."
    )


def unpacked(file: Path) -> bytes:
    """The content of a file, decompressed if its name ends in .gz.

    Raises:
        AntherError: it is damaged.
    """
    content = file.read_bytes()
    if file.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise AntherError(f"{file} is damaged ({error}); replace it.") from error


def read_idx(content: bytes, file: Path) -> Array:
    """An array of unsigned bytes from the IDX format: 0, 0, type 8, rank, then big-endian sizes, then the values.

    Args:
        content: the whole file.
        file: for messages.

    Raises:
        AntherError: another type or rank than images (3) or labels (1), or another length than the header says.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or content[3] not in (1, 3):
        raise AntherError(f"{file} is no IDX file of bytes: it begins with {content[:4].hex()}; replace it.")
    rank = content[3]
    start = 4 + 4 * rank
    shape = struct.unpack(f">{rank}I", content[4:start]) if len(content) >= start else ()
    expected = int(np.prod(shape, dtype=object))
    if not shape or len(content) - start != expected:
        raise AntherError(
            f"{file} has {max(len(content) - start, 0)} values where its header says {expected if shape else 'nothing'}"
            "; it is cut off or damaged: replace it."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
