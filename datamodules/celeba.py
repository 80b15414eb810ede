"""CelebA: aligned faces, their 40 attributes, and the partition of the authors."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from datamodules.archives import extract
from datamodules.base import Array, ImageTable
from datamodules.folders import FolderImages, PlainFolder, image_files
from diffusion.assets import cache_dir
from diffusion.errors import AntherError
from diffusion.files import sha256


class _File(NamedTuple):
    name: str
    size: int
    sha256: str


# Sizes and sha256 as published in tensorflow/datasets, celeb_a.txt.
IMAGES = _File("img_align_celeba.zip", 1443490838, "46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74")
PARTITION = _File(
    "list_eval_partition.txt", 2836386, "fc955bcb3ef8fbdf7d5640d9a8693a8431b5f2ee291a5c1449a1549e7e073fe7"
)
ATTRIBUTES = _File("list_attr_celeba.txt", 26721026, "f0e5da289d5ccf75ffe8811132694922b60f2af59256ed362afa03fefba324d0")
PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
PAGE_HQ = "https://github.com/switchablenorms/CelebAMask-HQ"
MASKS = "CelebAMask-HQ-mask-anno"
COUNTS = {"train": 162_770, "val": 19_867, "test": 19_962}


class CelebA(FolderImages):
    """202,599 faces, aligned and cut to 178 × 218 (Liu et al., ICCV 2015, arXiv 1411.7766).

    The authors' partition: 162,770 images in "train", 19,867 in "val", 19,962 in "test". A square of 178, the whole
    width, is taken from the middle; `crop=140` looks closer at the face. The 40 attributes are in the table; they are
    no classes, so the one class is "face" unless `attribute` names one.

    Args:
        path: a folder, or one with a folder `celeba/` (torchvision's), that holds `img_align_celeba.zip` or what it
            unpacks to, `list_eval_partition.txt` and `list_attr_celeba.txt`. Nothing is fetched, since its publisher's
            Google Drive refuses most requests. Fewer images are fine where the partition names these and no others.
        attribute: makes two classes of one attribute, e.g. `Smiling`: "not smiling" and "smiling".
        **settings: those of `FolderImages`, without `classes` and `nouns`.
    """

    def __init__(self, *, path: str, attribute: str | None = None, **settings: Any) -> None:
        self.attribute = attribute
        super().__init__(**{"name": "celeba"} | settings, path=path)

    @property
    def folder(self) -> Path:
        """Where the files of the authors lie."""
        path = Path(str(self.path)).expanduser().absolute()
        return path / "celeba" if (path / "celeba").is_dir() else path

    def locate(self) -> Path:
        """See `FolderImages`."""
        for file in (PARTITION, ATTRIBUTES):
            if not (self.folder / file.name).is_file():
                raise self._missing(file)
        images = self.folder / IMAGES.name.removesuffix(".zip")
        if not images.is_dir():
            archive = self.folder / IMAGES.name
            if not archive.is_file():
                raise self._missing(IMAGES)
            images = extract(archive, cache_dir() / "data" / f"celeba-{sha256(archive)[:16]}") / images.name
        return images / images.name if (images / images.name).is_dir() else images

    def _missing(self, file: _File) -> AntherError:
        return AntherError(
            f"CelebA's {file.name} is not in {self.folder}: download it from {PAGE} ({file.size:,} bytes, sha256 "
            f"{file.sha256}) and put {IMAGES.name}, {PARTITION.name} and {ATTRIBUTES.name} into one folder, named by "
            "data.path."
        )

    def find(self, root: Path) -> tuple[list[Path], list[int], list[str]]:
        """See `FolderImages`; the files are those of the partition, which must name all that are there."""
        partition = self._partition()
        files = [root / name for name in partition]
        if absent := [file for file in files if not file.is_file()]:
            raise AntherError(
                f"{len(absent):,} of the {len(files):,} images of {PARTITION.name} are not in {root}, such as "
                f"{absent[0].name}: get {IMAGES.name} again."
            )
        there = [file.relative_to(root).as_posix() for file in image_files(root, root)]
        if unlisted := [name for name in there if name not in partition]:
            raise AntherError(
                f"{PARTITION.name} has no line for {len(unlisted):,} of the {len(there):,} images in {root}, such as "
                f"{unlisted[0]}: get it again (the authors' has {PARTITION.size:,} bytes, this one "
                f"{(self.folder / PARTITION.name).stat().st_size:,}), or take out the images that it does not name."
            )
        if self.attribute is None:
            return files, [0] * len(files), ["face"]
        names, values = read_attributes(self.folder / ATTRIBUTES.name)
        if self.attribute not in names:
            raise AntherError(f"data.attribute={self.attribute} is none of CelebA's: choose from {', '.join(names)}.")
        column = names.index(self.attribute)
        word = self.attribute.replace("_", " ").lower()
        return files, [int(self._of(values, file.name)[column]) for file in files], [f"not {word}", word]

    def caption(self, class_name: str) -> str:
        """See `FolderImages`; of an attribute the caption is the class."""
        return super().caption(class_name) if self.attribute is None else class_name

    def load(self) -> ImageTable:
        """See `ImageDataModule`; with the attributes."""
        table = super().load()
        names, values = read_attributes(self.folder / ATTRIBUTES.name)
        rows = np.stack([self._of(values, name) for name in table.names])
        return replace(table, attributes=torch.from_numpy(rows), attribute_names=names)

    def make_splits(self, table: ImageTable) -> dict[str, Array]:
        """The partition of the authors."""
        partition = self._partition()
        parts = np.array([partition[name] for name in table.names])
        return {name: np.flatnonzero(parts == k) for k, name in enumerate(COUNTS)}

    def _partition(self) -> dict[str, int]:
        return read_partition(self.folder / PARTITION.name)

    def _of(self, values: Mapping[str, Array], name: str) -> Array:
        if name not in values:
            raise AntherError(f"{self.folder / ATTRIBUTES.name} has no line for {name}; get it again.")
        return values[name]


class CelebAHQ(PlainFolder):
    """30,000 faces of CelebA at 1,024 px (Karras et al., ICLR 2018, arXiv 1710.10196), or smaller copies of them.

    A folder or archive of images, such as `CelebAMask-HQ.zip` (Lee et al., CVPR 2020), whose masks are left out.
    """

    def find(self, root: Path) -> tuple[list[Path], list[int], list[str]]:
        """See `FolderImages`."""
        files, _, class_names = super().find(root)
        faces = [file for file in files if MASKS not in file.relative_to(root).parts]
        return faces, [0] * len(faces), class_names

    def _remedy(self, archive: str) -> str:
        return (
            f"download CelebAMask-HQ.zip from {PAGE_HQ}, whose CelebA-HQ-img/ has the 30,000 faces, and put it there "
            f"as {archive} or name it by data.path"
        )


def read_partition(path: Path) -> dict[str, int]:
    """0, 1 or 2 (train, val, test) by file name, from lines such as `000001.jpg 0`.

    Raises:
        AntherError: a line is something else, an image has two, or all of CelebA's have one and the parts are of other
            sizes than the authors'.
    """
    partition: dict[str, int] = {}
    for number, line in enumerate(_lines(path), 1):
        words = line.split()
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise AntherError(f"line {number} of {path} is {line!r} and not like '000001.jpg 0'; get the file again.")
        if words[0] in partition:
            raise AntherError(f"line {number} of {path} names {words[0]} a second time; get the file again.")
        partition[words[0]] = int(words[1])
    sizes = np.bincount([*partition.values()], minlength=len(COUNTS)).tolist()
    if len(partition) == sum(COUNTS.values()) and sizes != [*COUNTS.values()]:
        raise AntherError(
            f"{path} is damaged, since its parts have {_sizes(sizes)} images and not {_sizes(COUNTS.values())} as the "
            "authors'; get it again."
        )
    return partition


def _sizes(counts: Iterable[int]) -> str:
    return " / ".join(f"{count:,}" for count in counts)


def read_attributes(path: Path) -> tuple[tuple[str, ...], dict[str, Array]]:
    """The names of the attributes, and by file name which of them an image has, bool (A,).

    The file has the number of images, the names, and lines such as `000001.jpg -1 1 ...`.

    Raises:
        AntherError: it is something else.
    """
    lines = _lines(path)
    names = tuple(lines[1].split()) if len(lines) > 1 else ()
    values = {}
    for number, line in enumerate(lines[2:], 3):
        file, *signs = line.split()
        if len(signs) != len(names) or not set(signs) <= {"1", "-1"}:
            raise AntherError(f"line {number} of {path} has no {len(names)} values of 1 or -1; get the file again.")
        values[file] = np.array([sign == "1" for sign in signs])
    if not names or str(len(values)) != lines[0].strip():
        raise AntherError(f"{path} is cut off or is no list of attributes; get it again.")
    return names, values


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise AntherError(f"{path} is no text; get it again.") from error
