"""Oxford Flowers-102 with the splits of its authors."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.archives import extract
from datamodules.base import Array, ImageTable, random_split
from datamodules.folders import FolderImages
from diffusion.assets import ASSETS, cache_dir, resolve
from diffusion.errors import AntherError, install
from diffusion.files import sha256

IMAGES, LABELS, SPLITS = (Path(ASSETS[f"flowers102/{part}"].file).name for part in ("images", "labels", "splits"))
OFFICIAL = {"train": "trnid", "val": "valid", "test": "tstid"}
COUNTS = {"train": 1020, "val": 1020, "test": 6149}
BY_SEED = "split by a seed with data.split='{train: 0.8, val: 0.1, test: 0.1}'"


class Flowers102(FolderImages):
    """8,189 photos of 102 species common in the United Kingdom (Nilsback and Zisserman, ICVGIP 2008).

    The authors' splits: 1,020 images in "train" and 1,020 in "val", ten of each species, 6,149 in "test".

    Args:
        path: a folder with `102flowers.tgz` or its `jpg/`, with `imagelabels.mat` and `setid.mat` (torchvision's
            `flowers-102/` too); or a folder or archive with a folder of `image_01234.jpg` per species. By default the
            authors' three files are fetched.
        roles: which of the authors' splits plays which part, e.g. `{train: test, val: val, test: train}` as in seed
            004; by default each its own.
        split: fractions, to split by `split_seed` instead of as the authors did.
        **settings: those of `FolderImages`.

    Raises:
        AntherError: `roles` is no rearrangement of train, val and test, or comes with `split`.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        roles: Mapping[str, str] | None = None,
        split: Mapping[str, float] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**{"name": "flowers102"} | settings, path=path, asset="flowers102/images", split=split)
        self.roles = dict(roles or {name: name for name in OFFICIAL})
        if not (set(self.roles) == set(self.roles.values()) == set(OFFICIAL)):
            raise AntherError(f"data.roles={self.roles} must give train, val and test one of train, val and test each.")
        if roles is not None and split is not None:
            raise AntherError("data.roles rearranges the authors' splits, which data.split replaces: drop one of them.")
        self.official = split is None
        self._files: list[Path] = []  # of every species that is there, chosen or not
        self._complete = True  # every species is there
        self._places: list[Path] = []  # folders that may hold the authors' .mat files
        self._setid: Path | None = None

    @property
    def species(self) -> list[str]:
        """The 102 names, in the order of the authors' labels."""
        from torchvision.datasets import Flowers102 as Reference

        return list(Reference.classes)

    def locate(self) -> Path:
        """See `FolderImages`."""
        if self.path is None:
            self._setid = resolve("flowers102/splits")
            return self._unpacked(resolve("flowers102/images"))
        path = Path(self.path).expanduser().absolute()
        for folder in (path, path / "flowers-102"):
            if (folder / "jpg").is_dir() or (folder / IMAGES).is_file():
                self._places, self._setid = [folder], folder / SPLITS
                if (folder / "jpg").is_dir():
                    return folder
                return extract(folder / IMAGES, cache_dir() / "data" / f"flowers102-{sha256(folder / IMAGES)[:16]}")
        root = super().locate()
        beside = [path, path.parent] if path.is_dir() else [path.parent]
        self._places = [*beside, root, (cache_dir() / "assets" / ASSETS["flowers102/splits"].file).parent]
        self._setid = self._there(SPLITS)
        return root

    def find(self, root: Path) -> tuple[list[Path], list[int], list[str]]:
        """See `FolderImages`; the labels are the authors', or the folders' names."""
        names = list(self.classes) if self.classes else self.species
        if (root / "jpg").is_dir():
            every = read_mat(self._labels_file(), "labels") - 1
            files = [root / "jpg" / f"image_{k:05d}.jpg" for k in range(1, len(every) + 1)]
            species = [self.species[label] for label in every]
            complete = True
        else:
            files, folder_labels, folders = self._by_folder(root)
            species = [folders[label] for label in folder_labels]
            complete = set(folders) == set(self.species)
        self._files, self._complete = files, complete
        if unknown := set(names) - set(self.species):
            raise AntherError(f"data.classes has {', '.join(sorted(unknown))}, which is none of the 102 species.")
        kept = [(file, names.index(name)) for file, name in zip(files, species, strict=True) if name in names]
        if absent := [file for file, _ in kept if not file.is_file()]:
            raise AntherError(f"{len(absent)} images are missing, the first is {absent[0]}: get {IMAGES} again.")
        return [file for file, _ in kept], [label for _, label in kept], names

    def _by_folder(self, root: Path) -> tuple[list[Path], list[int], list[str]]:
        chosen, self.classes = self.classes, None
        try:
            files, labels, folders = super().find(root)
        finally:
            self.classes = chosen
        official = {_plain(name): name for name in self.species}
        if unknown := [name for name in folders if _plain(name) not in official]:
            raise AntherError(f"{root} has a folder {unknown[0]!r}, which is none of the 102 species of Flowers-102.")
        return files, labels, [official[_plain(name)] for name in folders]

    def _labels_file(self) -> Path:
        if self.path is None:
            return resolve("flowers102/labels")
        file = self._there(LABELS)
        if file is None:
            raise AntherError(
                f"{self._places[0] / LABELS} is missing; fetch {ASSETS['flowers102/labels'].urls[0]} and put it there."
            )
        return file

    def _there(self, name: str) -> Path | None:
        return next((place / name for place in self._places if (place / name).is_file()), None)

    def make_splits(self, table: ImageTable) -> dict[str, Array]:
        """The authors' splits under the names that `roles` gives them, or those of `split`."""
        if not self.official:
            return random_split(len(table), self.split, self.split_seed)
        if self._setid is None or not self._setid.is_file():
            asset = ASSETS["flowers102/splits"]
            raise AntherError(
                f"the authors' splits of Flowers-102 stand in {SPLITS}, which is not beside {self.path}: fetch "
                f"{asset.urls[0]} (sha256 {asset.sha256}) and put it there, or {BY_SEED}."
            )
        ids = {name: read_mat(self._setid, key).tolist() for name, key in OFFICIAL.items()}
        self._check_whole(self._setid, ids)
        # What has no row here cannot be decoded, or is of a species that was not chosen.
        rows = {image_id(name): row for row, name in enumerate(table.names)}
        parts = {name: np.array(sorted(rows[k] for k in ids[name] if k in rows), np.int64) for name in ids}
        return {role: parts[name] for role, name in self.roles.items()}

    def _check_whole(self, setid: Path, ids: Mapping[str, list[int]]) -> None:
        sizes = {name: len(part) for name, part in ids.items()}
        total = sum(sizes.values())
        if total == sum(COUNTS.values()) and sizes != COUNTS:
            raise AntherError(
                f"{setid} is damaged, since its parts have {sizes} images and the authors' {COUNTS}; get it again."
            )
        there = {image_id(file.name) for file in self._files}
        if not (absent := sorted(set().union(*ids.values()) - there)):
            return
        said = (
            f"{len(absent):,} of the {total:,} images of {setid} are not in {self.path or IMAGES}, the first is "
            f"image_{absent[0]:05d}.jpg"
        )
        if self._complete:
            raise AntherError(f"{said}: get the images again, or {BY_SEED}.")
        # Only imagelabels.mat knows whether they are of the species that were chosen.
        logging.getLogger(__name__).warning("%s; not every species is there, so these may be of another", said)

    def describe(self) -> str:
        """Which splits these are, too."""
        if not self.official:
            return f"{super().describe()}; split by seed {self.split_seed}"
        moved = [f"{role} is the authors' {name}" for role, name in self.roles.items() if role != name]
        return f"{super().describe()}; {', '.join(moved) or 'the splits of the authors'}"

    def split_record(self) -> dict[str, Any]:
        """Which splits these are, too."""
        return super().split_record() | {"official": self.official, "roles": self.roles if self.official else None}


def image_id(name: str) -> int:
    """The authors' number of an image: 6765 for `rose/image_06765.jpg`.

    Raises:
        AntherError: the name has none.
    """
    found = re.search(r"image_(\d+)\.\w+$", name)
    if found is None:
        raise AntherError(f"{name} is not called image_01234.jpg, so Flowers-102's splits do not know it; rename it.")
    return int(found[1])


def read_mat(path: Path, key: str) -> Array:
    """A row of whole numbers from a MATLAB file.

    Raises:
        AntherError: SciPy is not installed, or the file is damaged or has no such row.
    """
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise AntherError(f"Flowers-102 needs SciPy for its .mat files: {install('analysis')}.") from error
    try:
        return np.atleast_1d(loadmat(path, squeeze_me=True)[key]).astype(np.int64)
    # What SciPy raises for damaged files depends on where the damage is.
    except Exception as error:
        raise AntherError(f"{path} has no row {key!r} that can be read ({error}); get it again.") from error


def _plain(name: str) -> str:
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()
    return "lotus" if words == "lotus lotus" else words  # so it is called in the widely copied list of the names
