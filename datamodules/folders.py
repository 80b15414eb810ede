"""Photos in one folder per class: from a folder, an archive, an address, or an asset."""

import csv
import errno
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch

from datamodules.archives import IMAGE_SUFFIXES, content_root, extract, hidden
from datamodules.augment import Augment
from datamodules.base import (
    Array,
    ImageDataModule,
    ImageTable,
    UndecodableError,
    cached_images,
    content_digest,
    is_deep,
    open_rgb,
)
from datamodules.exclusion import Exclusion
from diffusion import secrecy
from diffusion.assets import cache_dir, download, resolve
from diffusion.errors import AntherError
from diffusion.files import sha256

KINDS = ", ".join(sorted(IMAGE_SUFFIXES))
ARCHIVES = (".zip", ".tgz", ".tar.gz", ".tar")
_TEXTS = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".html", ".pdf", ".log"}
_ARRAYS = {".mat", ".npy", ".npz", ".parquet", ".pkl", ".pt", ".safetensors", ".zip", ".tar", ".tgz", ".gz"}
_TOOLS = {".db", ".ini", ".xmp", ".aae", ".py", ".ipynb", ".sh"}
# What lies beside images without anybody taking it for one.
COMPANIONS = _TEXTS | _ARRAYS | _TOOLS


class FolderImages(ImageDataModule):
    """Images in `path/{class}/*.jpg`.

    The short side is resized to `short_side` (bicubic, antialiased) and the central square taken, so the aspect never
    changes. EXIF orientation is honoured, transparency becomes white, and 16-bit grey is scaled to 8 bits.

    Args:
        batch_size: see `ImageDataModule`.
        seed: see `ImageDataModule`.
        size: height and width of a batch's images.
        path: a folder, an archive of it, or the http, https or file address of an archive; a download is kept in the
            cache. Where a folder is missing and an archive of that name lies beside it, the archive is used.
        asset: name in `diffusion.assets.ASSETS` of an archive, used where `path` is not given.
        classes: folder names in the order of the labels; by default all folders in alphabetical order.
        nouns: what one of a class is called in captions, by folder name; by default the folder's name in the singular.
        captions: template with `{noun}` or, with its article, `{a_noun}`.
        short_side: side of the decoded squares; more than `size` leaves a margin for random crops.
        crop: side of the central square that is taken, in pixels of the file; by default the file's short side.
        channels: 3 for RGB, 1 for grey.
        on_corrupt: `refuse` stops at files that cannot be decoded and names them, `skip` names them and goes on.
        name: for people; by default that of the folder or asset.
        val_batch_size: see `ImageDataModule`.
        drop_last: see `ImageDataModule`.
        num_workers: see `ImageDataModule`.
        augment: see `ImageDataModule`.
        split: see `ImageDataModule`.
        split_seed: see `ImageDataModule`.
        exclude: see `ImageDataModule`; files that cannot be decoded may be named there too.

    Attributes:
        needs_every_class: whether a class without an image stops it; not where such faults are what is looked for.
    """

    needs_every_class = True

    def __init__(
        self,
        *,
        batch_size: int,
        seed: int,
        size: int,
        path: str | None = None,
        asset: str | None = None,
        classes: Sequence[str] | None = None,
        nouns: Mapping[str, str] | None = None,
        captions: str = "A photo of {a_noun}",
        short_side: int | None = None,
        crop: int | None = None,
        channels: int = 3,
        on_corrupt: Literal["refuse", "skip"] = "refuse",
        name: str | None = None,
        val_batch_size: int | None = None,
        drop_last: bool = True,
        num_workers: int = 0,
        augment: Augment | None = None,
        split: Mapping[str, float] | None = None,
        split_seed: int = 42,
        exclude: str | None = None,
    ) -> None:
        if path is None and asset is None:
            raise AntherError("data.path is not set; give data.path=/path/to/a folder or archive of images.")
        super().__init__(
            name=name or asset or _stem(str(path)),
            image_shape=(channels, size, size),
            batch_size=batch_size,
            seed=seed,
            val_batch_size=val_batch_size,
            drop_last=drop_last,
            num_workers=num_workers,
            augment=augment,
            split=split,
            split_seed=split_seed,
            exclude=exclude,
        )
        self.short_side = size if short_side is None else short_side
        if channels not in (1, 3):
            raise AntherError(f"data.channels={channels}, but images are decoded to 3 (RGB) or 1 (grey).")
        if self.short_side < size:
            raise AntherError(f"data.short_side={short_side} is less than data.size={size}; make it equal or larger.")
        if on_corrupt not in ("refuse", "skip"):
            raise AntherError(f"data.on_corrupt={on_corrupt} is neither refuse nor skip.")
        if crop is not None and crop < 1:
            raise AntherError(f"data.crop={crop} must be at least 1; leave it out to take the whole short side.")
        if classes is not None and (not classes or len(set(classes)) < len(classes)):
            what = "is empty" if not classes else "names a class twice"
            raise AntherError(f"data.classes={list(classes)} {what}: name each folder once, or null for all of them.")
        self.crop = crop
        self.path, self.asset, self.on_corrupt = path, asset, on_corrupt
        self.classes = None if classes is None else tuple(classes)
        self.nouns, self.captions = dict(nouns or {}), captions
        try:
            self.caption("flower")
        except (KeyError, IndexError, ValueError) as error:
            raise AntherError(f"data.captions={captions!r} may hold {{noun}} and {{a_noun}}, not {error}.") from error
        self._told: set[str] = set()
        self._aside: Counter[str] = Counter()

    def load(self) -> ImageTable:
        """See `ImageDataModule`."""
        root = self.locate()
        files, labels, class_names = self.find(root)
        self._aside = other_kinds([root / name for name in self.classes] if self.classes else [root])
        names = [file.relative_to(root).as_posix() for file in files]
        shape = (self.image_shape[0], self.short_side, self.short_side)
        with ThreadPoolExecutor() as pool:
            content = list(pool.map(_sha256, files))
        how = "bicubic, centre, white" if self.crop is None else f"bicubic, centre {self.crop}, white"
        digest = content_digest([how, shape, names, content])
        faults: dict[int, Exclusion] = {}

        def decode(row: int) -> Array | None:
            try:
                with _read(files[row]):
                    return decode_square(files[row], self.short_side, self.image_shape[0], self.crop)
            except (MemoryError, AntherError):
                raise
            # What Pillow raises for damaged files depends on the format.
            except Exception as error:
                faults[row] = _fault(names[row], error)
                return None

        images, kept = cached_images(digest, len(files), shape, decode, f"decoding {self.name}")
        corrupt = sorted(set(range(len(files))) - set(kept))
        excluded = self.excluded
        self._judge({files[row]: faults[row].details for row in corrupt if names[row] not in excluded})
        if not kept:
            raise AntherError(
                f"none of the {len(files):,} image files in {root} can be decoded, such as {files[0]} "
                f"({faults[0].details}): replace them or correct data.path."
            )
        missing = set(range(len(class_names))) - {labels[row] for row in kept}
        if missing and self.needs_every_class:
            empty = ", ".join(class_names[label] for label in sorted(missing))
            raise AntherError(f"no image of {empty} in {root} can be decoded; replace them or change data.classes.")
        captions = [self.caption(class_name) for class_name in class_names]
        return ImageTable(
            images=images,
            labels=torch.tensor([labels[row] for row in kept]),
            class_names=tuple(class_names),
            names=tuple(names[row] for row in kept),
            captions=tuple(captions[labels[row]] for row in kept),
            digest=digest,
            files=tuple(files[row] for row in kept),
            unreadable=tuple(faults[row] for row in corrupt),
        )

    def locate(self) -> Path:
        """The folder that holds the class folders, downloaded and unpacked where that is needed.

        Raises:
            AntherError: there is nothing at `path`.
        """
        if self.path is None:
            assert self.asset is not None
            return self._unpacked(resolve(self.asset))
        scheme, _, address = self.path.partition("://")
        if address and scheme != "file":
            key = hashlib.sha256(self.path.encode()).hexdigest()[:16]
            archive = cache_dir() / "downloads" / f"{key}-{self.path.split('?')[0].rsplit('/', 1)[-1]}"
            if not archive.is_file():
                download(self.path, archive)
            elif self.path not in self._told:
                self._told.add(self.path)
                made = datetime.fromtimestamp(archive.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
                logging.getLogger(__name__).info(
                    "%s: using the copy of %s; to download it again delete %s", secrecy.hidden(self.path), made, archive
                )
            return self._unpacked(archive)
        # A file is read where it lies: nobody expects a copy of what it was.
        path = Path(url2pathname(urlsplit(self.path).path) if address else self.path).expanduser().absolute()
        beside = [path.with_name(path.name + suffix) for suffix in ARCHIVES]
        for candidate in [path, *beside]:
            if candidate.is_dir():
                return content_root(candidate)
            if candidate.is_file():
                return self._unpacked(candidate)
        raise AntherError(
            f"the images are not there: neither {path} nor {beside[0].name} beside it exists; "
            f"{self._remedy(beside[0].name)}."
        )

    def _remedy(self, archive: str) -> str:
        return (
            f"give data.path=/path/to/{archive} (a folder, an archive or an address), or choose data=flowers210, which "
            "is fetched by itself"
        )

    def _unpacked(self, archive: Path) -> Path:
        return extract(archive, cache_dir() / "data" / f"{_stem(archive.name)}-{sha256(archive)[:16]}")

    def find(self, root: Path) -> tuple[list[Path], list[int], list[str]]:
        """The files in the order of the table, their labels, and the names of the classes.

        Raises:
            AntherError: a class folder is missing or empty, or there is none.
        """
        folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not hidden(path.name))
        if not folders:
            raise AntherError(
                f"{root} holds no class folders; put the images into {root}/CLASS/, one folder per class."
            )
        class_names = list(self.classes) if self.classes else folders
        if missing := [name for name in class_names if name not in folders]:
            raise AntherError(
                f"{root} has no folder for {', '.join(missing)}; it has {', '.join(folders)}: correct data.classes."
            )
        files: list[Path] = []
        labels: list[int] = []
        for label, class_name in enumerate(class_names):
            found = image_files(root / class_name, root)
            if not found and self.needs_every_class:
                raise AntherError(
                    f"the class folder {root / class_name} holds no images ({KINDS}); fill it "
                    "or leave it out of data.classes."
                )
            files += found
            labels += [label] * len(found)
        if not files:
            raise AntherError(f"no class folder in {root} holds images ({KINDS}); correct data.path.")
        return files, labels, class_names

    def caption(self, class_name: str) -> str:
        """The caption of an image of a class."""
        noun = self.nouns.get(class_name) or singular(class_name.replace("_", " "))
        article = "an" if noun[0].lower() in "aeiou" else "a"
        return self.captions.format(noun=noun, a_noun=f"{article} {noun}")

    def describe(self) -> str:
        """Also which files were taken for no images."""
        if not self._aside:
            return super().describe()
        kinds = sorted(self._aside, key=lambda kind: (-self._aside[kind], kind))
        shown = ", ".join(kinds[:5]) + (", …" if len(kinds) > 5 else "")
        count = self._aside.total()
        files = "1 file" if count == 1 else f"{count:,} files"
        return f"{super().describe()}; {files} of other kinds left aside ({shown})"

    def _judge(self, corrupt: Mapping[Path, str]) -> None:
        if not corrupt:
            return
        shown = ", ".join(f"{file} ({details})" for file, details in islice(corrupt.items(), 10))
        shown += f" and {len(corrupt) - 10} more" if len(corrupt) > 10 else ""
        if self.on_corrupt == "refuse":
            raise AntherError(
                f"{len(corrupt)} of the image files cannot be decoded: {shown}; replace them, or go on without them "
                "with data.on_corrupt=skip."
            )
        if shown not in self._told:
            self._told.add(shown)
            logging.getLogger(__name__).warning("skipped %d files that cannot be decoded: %s", len(corrupt), shown)


class PlainFolder(FolderImages):
    """Every image below a folder, whatever its folders mean: one class, for models without a condition.

    Args:
        noun: what an image shows, the name of the one class.
        **settings: those of `FolderImages`, without `classes` and `nouns`.
    """

    def __init__(self, *, noun: str = "image", **settings: Any) -> None:
        super().__init__(nouns={noun: noun}, **settings)
        self.noun = noun

    def find(self, root: Path) -> tuple[list[Path], list[int], list[str]]:
        """See `FolderImages`."""
        files = image_files(root, root)
        if not files:
            raise AntherError(f"{root} holds no images ({KINDS}); correct data.path.")
        return files, [0] * len(files), [self.noun]


class Flowers210(FolderImages):
    """210 photos of flowers, 128 px, ten species, with their labels in `flower_labels.csv`.

    Small, and to be had wherever a package index is. The order of the species is that of the data set's page (O.
    Belitskaya, "Flower Color Images", Kaggle, 2018): phlox, rose, calendula, iris, Leucanthemum maximum, bellflower,
    viola, Rudbeckia laciniata, peony, aquilegia.
    """

    SPECIES = (
        "phlox",
        "rose",
        "calendula",
        "iris",
        "shasta_daisy",
        "bellflower",
        "viola",
        "rudbeckia",
        "peony",
        "aquilegia",
    )

    def find(self, root: Path) -> tuple[list[Path], list[int], list[str]]:
        """See `FolderImages`; the labels come from the table beside the images."""
        table = next(iter(sorted(root.rglob("flower_labels.csv"))), None)
        if table is None:
            raise AntherError(f"{root} holds no flower_labels.csv; leave data.path out to have the archive fetched.")
        class_names = list(self.classes or self.SPECIES)
        if unknown := set(class_names) - set(self.SPECIES):
            raise AntherError(f"data.classes has {', '.join(sorted(unknown))}; choose from {', '.join(self.SPECIES)}.")
        files: list[Path] = []
        labels: list[int] = []
        with table.open(newline="") as file:
            for record in csv.DictReader(file):
                species = self.SPECIES[int(record["label"])]
                if species in class_names:
                    files.append(table.parent / record["file"])
                    labels.append(class_names.index(species))
        if absent := [file for file in files if not file.is_file()]:
            raise AntherError(f"{table} names {absent[0].name}, which is not there; get the archive again.")
        return files, labels, class_names


def _fault(name: str, error: Exception) -> Exclusion:
    from PIL import UnidentifiedImageError

    if isinstance(error, UndecodableError):
        return Exclusion(name, error.reason, str(error))
    # Pillow's own words for this one repeat the path.
    unknown = "is no image of a kind that Pillow knows" if isinstance(error, UnidentifiedImageError) else ""
    return Exclusion(name, "unreadable", unknown or str(error) or type(error).__name__)


def _sha256(path: Path) -> str:
    with _read(path):
        # A key of their own: tables that were made before such images were scaled have them clipped.
        return sha256(path) + (" scaled" if is_deep(path) else "")


@contextmanager
def _read(path: Path) -> Iterator[None]:
    """Tells what the system refuses from what is wrong with a file, whose errors have no number.

    Raises:
        AntherError: the file cannot be read.
    """
    try:
        yield
    except OSError as error:
        # An invalid argument is a place in front of the file's beginning, which a damaged header names.
        if error.errno in (None, errno.EINVAL):
            raise
        raise AntherError(
            f"cannot read {path}: {os.strerror(error.errno)}; the image itself may be whole, so mend that and start "
            "again."
        ) from error


def image_files(folder: Path, root: Path) -> list[Path]:
    """The images in a folder and below, in the order of their paths relative to `root`; hidden ones do not count.

    Raises:
        AntherError: the name of one is not UTF-8, so that no list or record could hold it.
    """
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    named = {path.relative_to(root).as_posix(): path for path in found}
    files = [path for name, path in sorted(named.items()) if not any(map(hidden, name.split("/")))]
    if strange := [path for path in files if not _is_text(path.relative_to(root).as_posix())]:
        shown = os.fsencode(strange[0]).decode("utf-8", "backslashreplace")
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise AntherError(f"the names of these image files are not UTF-8: {shown}{more}; rename them.")
    return files


def other_kinds(folders: Sequence[Path]) -> Counter[str]:
    """By suffix, how many files in these folders and below are no images, nor what usually lies beside images."""
    found: Counter[str] = Counter()
    for folder in folders:
        for _, below, names in os.walk(folder):
            below[:] = [name for name in below if not hidden(name)]
            found.update(Path(name).suffix.lower() for name in names if not hidden(name))
    return Counter({kind: n for kind, n in found.items() if kind and kind not in IMAGE_SUFFIXES | COMPANIONS})


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def decode_square(path: Path, side: int, channels: int, crop: int | None = None) -> Array:
    """The central square of an image, resized to `side`: uint8 (channels, side, side).

    The square is the file's short side wide, or `crop` where that is less.
    """
    from PIL import Image

    image = open_rgb(path)
    width, height = image.size
    short = min(width, height) if crop is None else min(width, height, crop)
    # Cutting first gives the square of resizing first, without rounding the long side.
    left, top = (width - short) // 2, (height - short) // 2
    square = image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))
    pixels = np.asarray(square.convert("L"))[..., None] if channels == 1 else np.asarray(square)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def singular(noun: str) -> str:
    """One of an English plural: roses -> rose, daisies -> daisy; iris and grass stay."""
    if noun.endswith("ies"):
        return noun[:-3] + "y"
    return noun if not noun.endswith("s") or noun.endswith(("ss", "is", "us")) else noun[:-1]


def _stem(path: str) -> str:
    name = path.split("?")[0].rstrip("/").rsplit("/", 1)[-1]
    return next((name.removesuffix(suffix) for suffix in ARCHIVES if name.endswith(suffix)), name)
