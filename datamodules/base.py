"""Decoded data sets, their splits, and loaders whose every batch is a function of (seed, epoch)."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.exclusion import Exclusion, read_exclusions
from diffusion.assets import cache_dir
from diffusion.errors import AntherError
from diffusion.files import atomic
from diffusion.images import centre_crop, from_uint8
from diffusion.rng import generator

if TYPE_CHECKING:
    from PIL import Image

    from datamodules.augment import Augment

Array = np.ndarray

MAX_PIXELS = 2**26
"""8192 x 8192: an image file that declares more is taken for a bomb."""

_BITS_PER_SAMPLE = 258  # a tag of TIFF


class UndecodableError(ValueError):
    """A file that is not taken for an image although it may be whole; says why, and what to do.

    Attributes:
        reason: one word, as in a list of exclusions.
    """

    def __init__(self, details: str, reason: str = "unreadable") -> None:
        super().__init__(details)
        self.reason = reason


@dataclass(frozen=True)
class ImageTable:
    """A decoded data set: row i is image i for ever.

    Attributes:
        images: uint8 (N, C, H, W), read-only; a memory map of the cache where there is one.
        labels: int64 (N,), positions in `class_names`.
        class_names: one per class, in the order of the labels.
        names: one unique id per row: the relative path, or `train/00017`.
        captions: one per row.
        digest: sha256 over content and decoding parameters, the key of every cache built on the table.
        files: one path per row where rows are decoded files, else empty.
        unreadable: the files that could not be decoded and have no row, each with why.
        attributes: bool (N, A), what else is known of each row; None where nothing is.
        attribute_names: A of them.
    """

    images: Array
    labels: Tensor
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    captions: tuple[str, ...]
    digest: str
    files: tuple[Path, ...] = ()
    unreadable: tuple[Exclusion, ...] = ()
    attributes: Tensor | None = None
    attribute_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = {len(self.images), len(self.labels), len(self.names), len(self.captions)}
        counts |= {len(self.files)} if self.files else set()
        counts |= set() if self.attributes is None else {len(self.attributes)}
        if len(counts) != 1 or self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise ValueError(f"a table needs uint8 (N, C, H, W) and N of everything: {self.images.shape}, {counts}")
        if len(set(self.names)) != len(self.names):
            raise ValueError("the names of a table's rows must be unique")

    def __len__(self) -> int:
        return len(self.images)

    def original(self, i: int) -> "Image.Image":
        """Image i before resizing and cropping, in RGB; for rows that never were files, the row itself."""
        from PIL import Image

        if self.files:
            return open_rgb(self.files[i])
        pixels = np.asarray(self.images[i]).transpose(1, 2, 0)
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")


def open_rgb(path: Path) -> "Image.Image":
    """Decodes a file to RGB, upright by its EXIF orientation, transparency over white, 16 bits scaled to 8.

    Raises:
        OSError, ValueError, SyntaxError: what Pillow raises for files that are not whole images.
        UndecodableError: the header declares more than `MAX_PIXELS`, or nothing says which values are black and white.
    """
    from PIL import Image, ImageOps

    with _opened(path) as image:
        # Pillow warns here and refuses from twice as many on; a few at a time would fill the memory.
        if image.width * image.height > MAX_PIXELS:
            raise _too_large(f"{image.width} x {image.height}")
        upright = ImageOps.exif_transpose(image)
        if _deep(image):
            return _eight_bits(upright, _bits(image)).convert("RGB")
        if not upright.has_transparency_data:
            # A copy already, of what may be tens of megapixels.
            return upright if upright.mode == "RGB" else upright.convert("RGB")
        rgba = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def is_deep(path: Path) -> bool:
    """Whether a file has grey values of more than 8 bits, which `open_rgb` scales or refuses."""
    from PIL import Image

    with path.open("rb") as file:
        if file.read(3) == b"\xff\xd8\xff":  # JPEG never has, and most files are
            return False
    try:
        with Image.open(path) as image:
            return _deep(image)
    # What Pillow raises for damaged files depends on the format.
    except Exception:
        return False


def _deep(image: "Image.Image") -> bool:
    return image.mode[0] in "IF"


def _bits(image: "Image.Image") -> int:
    """Of the values of a deep image.

    Raises:
        UndecodableError: their range is not known.
    """
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise UndecodableError("has values that are NaN or infinity (mode F)", "non_finite")
    if image.mode.startswith("I;16"):
        # TIFF also has 12 bits in this mode.
        return int(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0])
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 16  # the most that a PNG has, and what Pillow scales a PPM to
    kind = "floating-point numbers" if image.mode == "F" else "whole numbers of 32 bits or with a sign"
    raise UndecodableError(
        f"has {kind} (mode {image.mode}), of which nothing says where white is: save it with 8 or 16 bits"
    )


def _eight_bits(image: "Image.Image", bits: int) -> "Image.Image":
    from PIL import Image

    values, white = np.asarray(image).astype(np.uint32), 2**bits - 1
    pixels = ((values * 255 + white // 2) // white).astype(np.uint8)
    if "transparency" in image.info:
        pixels[values == image.info["transparency"]] = 255
    return Image.fromarray(pixels)


def _opened(path: Path) -> "Image.Image":
    from PIL import Image

    try:
        return Image.open(path)
    except Image.DecompressionBombError as error:
        raise _too_large("far too many") from error


def _too_large(size: str) -> UndecodableError:
    return UndecodableError(f"declares {size} pixels, more than {MAX_PIXELS:,}: make the image smaller", "too_large")


def content_digest(parts: Sequence[object], arrays: Sequence[bytes | Array] = ()) -> str:
    """sha256 over parameters (by their JSON) and raw content; equal inputs give equal digests on any machine."""
    digest = hashlib.sha256(json.dumps(list(parts), sort_keys=True, default=str).encode())
    for array in arrays:
        digest.update(array if isinstance(array, bytes) else np.ascontiguousarray(array).data)
    return digest.hexdigest()


def cached_images(
    digest: str, count: int, shape: tuple[int, int, int], decode: Callable[[int], Array | None], label: str
) -> tuple[Array, list[int]]:
    """The pixels of a table: from the cache, or decoded once by threads, with a progress bar, and stored there.

    Rows that were left out are tried again: if one can be decoded by now, the cache is made anew.

    Args:
        digest: the key; must change with the content and with every decoding parameter.
        count: number of candidate rows.
        shape: (C, H, W) of a row.
        decode: row number -> uint8 (C, H, W), or None to leave the row out.
        label: what the progress bar says.

    Returns:
        uint8 (n, C, H, W), memory-mapped and read-only, and the n row numbers that were kept, ascending.
    """
    path = cache_dir() / "tables" / f"{digest}.npy"
    rows_path = path.with_suffix(".json")
    found = _load(path, rows_path, count, shape)
    if found is not None and all(decode(row) is None for row in sorted(set(range(count)) - set(found[1]))):
        return found
    kept: list[int] = []
    with atomic(path) as temporary:
        # Row by row, since a large data set does not fit in memory; not np.save, whose error on a full disk has no
        # number, nor a writable map, which dies of it.
        with temporary.open("wb") as file:
            _write_header(file, (count, *shape))
            for row, pixels in _decoded(count, decode, label):
                if pixels is not None:
                    if pixels.shape != shape or pixels.dtype != np.uint8:
                        raise ValueError(f"row {row} is {pixels.dtype} {pixels.shape}, not uint8 {shape}")
                    file.write(np.ascontiguousarray(pixels).data)
                    kept.append(row)
            file.seek(0)
            _write_header(file, (len(kept), *shape))  # NumPy pads headers for just this: any count takes as many bytes
        # The rows come first: an array without them is not loaded.
        with atomic(rows_path) as temporary_rows:
            temporary_rows.write_text(json.dumps({"count": count, "rows": kept}))
    found = _load(path, rows_path, count, shape)
    if found is None:
        raise AntherError(f"the table just written to {path} cannot be read back; check the disk of that folder.")
    return found


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _decoded(count: int, decode: Callable[[int], Array | None], label: str) -> Iterator[tuple[int, Array | None]]:
    from rich.progress import track

    chunk = 256  # Bounds what waits decoded in memory.
    with ThreadPoolExecutor() as pool:
        for start in track(range(0, count, chunk), description=label, transient=True, disable=count < 2 * chunk):
            rows = range(start, min(start + chunk, count))
            yield from zip(rows, pool.map(decode, rows), strict=True)


def _load(path: Path, rows_path: Path, count: int, shape: tuple[int, int, int]) -> tuple[Array, list[int]] | None:
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        record = json.loads(rows_path.read_text())
        rows = record["rows"]
    except (OSError, ValueError, KeyError, EOFError):
        return None
    if not isinstance(images, np.ndarray):  # an archive of arrays
        return None
    fits = images.dtype == np.uint8 and images.shape == (len(rows), *shape) and record["count"] == count
    return (images, rows) if fits else None


class EpochSampler(Sampler[int]):
    """Positions of one rank in one epoch; a pure function of (seed, epoch, rank, world).

    Yields `epoch * n + position`, so that the epoch travels with each position into worker processes.

    Args:
        n: number of images.
        seed: of the order; None keeps the order as it is and forgets the epoch.
        rank: of this process; it takes `order[rank::world]`.
        world: number of processes. While shuffling, each gets equally many, so up to world - 1 images sit an epoch
            out; without shuffling none is left out and none repeated.
        weights: float (n,), while shuffling: images are drawn with replacement, each this often in proportion.
    """

    def __init__(self, n: int, seed: int | None, rank: int = 0, world: int = 1, weights: Tensor | None = None) -> None:
        self.n, self.seed, self.rank, self.world, self.weights = n, seed, rank, world, weights
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def _share(self) -> range:
        return range(self.rank, self.n if self.seed is None else self.n - self.n % self.world, self.world)

    def __len__(self) -> int:
        return len(self._share())

    def __iter__(self) -> Iterator[int]:
        if self.seed is None:
            yield from self._share()
            return
        rng = generator(self.seed, self.epoch)
        if self.weights is None:
            order = torch.randperm(self.n, generator=rng)
        else:
            order = torch.multinomial(self.weights, self.n, replacement=True, generator=rng)
        yield from (self.epoch * self.n + order[list(self._share())]).tolist()


class TableView(Dataset[dict[str, Tensor]]):
    """Some rows of a table as training batches; a batch is one gather.

    Args:
        table: the data set.
        rows: rows of the table, one per position.
        size: height and width of the images; a larger table is cropped, at the centre without augmentation.
        augment: drawn anew for each (seed, epoch, row), the same in any batch, order and number of workers.
        seed: of the augmentation.
    """

    def __init__(
        self, table: ImageTable, rows: Array, size: int, augment: "Augment | None" = None, seed: int = 0
    ) -> None:
        self.table, self.rows, self.size, self.augment, self.seed = table, rows, size, augment, seed
        self._pixels = np.asarray(table.images)
        self._drawn: tuple[int, Array] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[int]) -> dict[str, Tensor]:
        """A batch for keys `epoch * len(self) + position`; all keys of a batch are of one epoch."""
        epoch = keys[0] // len(self.rows)
        rows = self.rows[np.asarray(keys) % len(self.rows)]
        pixels = torch.from_numpy(self._pixels[rows])
        index = torch.from_numpy(rows)
        batch = {"index": index, "label": self.table.labels[index]}
        if self.augment is None:
            return batch | {"image": from_uint8(centre_crop(pixels, self.size))}
        image, labels = self.augment(pixels, torch.from_numpy(self._uniforms(epoch)[rows]), self.size)
        return batch | {"image": image} | ({} if labels is None else {"augment": labels})

    def _uniforms(self, epoch: int) -> Array:
        # One table of draws per epoch, indexed by row: no order, batch or worker can change what a row gets.
        if self._drawn is None or self._drawn[0] != epoch:
            assert self.augment is not None
            source = np.random.default_rng([self.seed, epoch, 1])
            self._drawn = (epoch, source.random((len(self.table), self.augment.draws)))
        return self._drawn[1]


class EpochLoader(DataLoader[dict[str, Tensor]]):
    """A loader that goes on in the middle of an epoch.

    Lightning stores `state_dict` in each checkpoint, so a resumed run sees the batches that were left, not the first
    ones again.
    """

    _yielded = 0
    _resume: tuple[int, int] = (-1, 0)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        # A generator on purpose: nothing is read before the first batch is asked for, and by then Lightning has set
        # the epoch, also in a resumed run, where it makes the iterator first.
        epoch, batches = self._resume
        skip = batches if getattr(self.sampler, "epoch", 0) == epoch else 0
        self._resume = (-1, 0)
        self._yielded = 0
        for batch in super().__iter__():
            self._yielded += 1
            if self._yielded > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were handed out."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches": self._yielded}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The next iteration leaves out what `state` says was handed out, if it is of the same epoch."""
        self._resume = (state["epoch"], state["batches"])


def as_is(batch: Any) -> Any:
    """Batches leave the data set collated."""
    return batch


def random_split(n: int, fractions: Mapping[str, float], seed: int) -> dict[str, Array]:
    """Disjoint sorted row numbers by name; together they are all n rows.

    Args:
        n: number of rows.
        fractions: of the rows, adding up to 1; each part but the last is rounded down, and one of 0 is left out.
        seed: of the permutation.

    Raises:
        AntherError: the fractions do not add up to 1, or a part would be empty.
    """
    if abs(sum(fractions.values()) - 1) > 1e-6 or min(fractions.values()) < 0:
        raise AntherError(f"data.split={dict(fractions)} must be positive fractions that add up to 1.")
    fractions = {name: share for name, share in fractions.items() if share}
    order = np.random.default_rng(seed).permutation(n)
    ends = [int(n * share + 1e-9) for share in np.cumsum(list(fractions.values()))[:-1]]
    parts = np.split(order, ends)
    splits = {name: np.sort(part).astype(np.int64) for name, part in zip(fractions, parts, strict=True)}
    if empty := [name for name, part in splits.items() if len(part) == 0]:
        raise AntherError(
            f"{n} images are too few for data.split={dict(fractions)}: {', '.join(empty)} is empty; give more images "
            "or other fractions."
        )
    return splits


class ImageDataModule(LightningDataModule, ABC):
    """A data set decoded once, split by name, and loaded reproducibly.

    A batch is a dict: `image` float32 (B, C, H, W) in [-1, 1], `index` int64 (B,) rows of the table, `label` int64
    (B,), and `augment` float32 (B, A) with the parameters of the augmentation where it reports them. Training order is
    a function of (seed, epoch), augmentation of (seed, epoch, row); validation and test are in order and never
    augmented. The trainer must run with `use_distributed_sampler=False`: the loaders know their rank.

    Args:
        name: what `describe` and the split record call the data set.
        image_shape: (C, H, W) of a batch's images; H = W.
        batch_size: images per process and step.
        seed: of order and augmentation.
        val_batch_size: by default `batch_size`.
        drop_last: leave out the last, smaller training batch of an epoch.
        num_workers: loader processes; 0 is fast enough for tables that fit in memory.
        augment: for training images.
        split: fractions by name; needs "train" and "val". A fraction of 0 makes no such split.
        split_seed: of the split alone, so that runs of several seeds share their validation images.
        balanced: draw training images with replacement, so that every class is equally frequent.
        exclude: a table of images to leave out, as analyze.py writes it: CSV with the columns `name` and `reason`. The
            splits are made first, so the images that stay keep their split.

    Raises:
        AntherError: a setting that no data set could have.
    """

    def __init__(
        self,
        *,
        name: str,
        image_shape: tuple[int, int, int],
        batch_size: int,
        seed: int,
        val_batch_size: int | None = None,
        drop_last: bool = True,
        num_workers: int = 0,
        augment: "Augment | None" = None,
        split: Mapping[str, float] | None = None,
        split_seed: int = 42,
        balanced: bool = False,
        exclude: str | None = None,
    ) -> None:
        super().__init__()
        val_batch_size = batch_size if val_batch_size is None else val_batch_size
        if batch_size < 1 or val_batch_size < 1 or image_shape[1] < 1:
            raise AntherError(
                f"data.batch_size={batch_size}, data.val_batch_size={val_batch_size} and data.size={image_shape[1]} "
                "must be at least 1."
            )
        if num_workers < 0:
            raise AntherError(f"data.num_workers={num_workers} counts processes: give 0 or more.")
        self.name = name
        self.image_shape = image_shape
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.seed, self.split_seed = seed, split_seed
        self.drop_last, self.num_workers, self.augment = drop_last, num_workers, augment
        self.balanced = balanced
        self.exclude = exclude
        self.exclusions: tuple[Exclusion, ...] = () if exclude is None else read_exclusions(Path(exclude).expanduser())
        self.split = dict(split) if split else {"train": 0.95, "val": 0.05}
        if absent := [name for name in ("train", "val") if not self.split.get(name)]:
            raise AntherError(
                f"data.split={self.split} has no {' and no '.join(absent)}: give both train and val a fraction of the "
                "images."
            )
        self._table: ImageTable | None = None
        self._splits: dict[str, Array] = {}

    @abstractmethod
    def load(self) -> ImageTable:
        """Gets, decodes and caches the data set; calling it again reads the cache.

        Raises:
            AntherError: the data set is missing or damaged.
        """

    def make_splits(self, table: ImageTable) -> dict[str, Array]:
        """Row numbers by split name; data sets with splits of their own override this."""
        return random_split(len(table), self.split, self.split_seed)

    def prepare_data(self) -> None:
        """Downloads and decodes, in one process per machine."""
        self.load()

    def setup(self, stage: str | None = None) -> None:
        """Reads the table and splits it; a second call does nothing."""
        if self._table is not None:
            return
        table = self.load()
        if table.images.shape[1] != self.image_shape[0] or min(table.images.shape[2:]) < self.image_shape[1]:
            raise AntherError(
                f"{self.name} holds images of shape {tuple(table.images.shape[1:])}, which do not give "
                f"{self.image_shape}; choose another data.size."
            )
        splits = self.make_splits(table)
        rows = np.concatenate(list(splits.values()))
        assert len(np.unique(rows)) == len(rows), "splits overlap"
        assert {"train", "val"} <= set(splits)
        self._table, self._splits = table, self._without_excluded(table, splits)

    def _without_excluded(self, table: ImageTable, splits: dict[str, Array]) -> dict[str, Array]:
        named = {exclusion.name for exclusion in self.exclusions}
        if unknown := sorted(named - set(table.names) - {fault.name for fault in table.unreadable}):
            shown = ", ".join(name if name == name.strip() else repr(name) for name in unknown[:5])
            shown += f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise AntherError(
                f"data.exclude={self.exclude} names {shown}, which {self.name} does not have: correct the list, or "
                "give the one that was made for these data."
            )
        stay = np.array([name not in named for name in table.names])
        left = {name: rows[stay[rows]] for name, rows in splits.items()}
        if empty := [name for name, rows in left.items() if not len(rows) and len(splits[name])]:
            raise AntherError(f"data.exclude={self.exclude} leaves no image in {', '.join(empty)}: shorten the list.")
        return left

    @property
    def excluded(self) -> dict[str, str]:
        """Name and reason of each image that `exclude` leaves out."""
        reasons: dict[str, list[str]] = {}
        for exclusion in self.exclusions:
            reasons.setdefault(exclusion.name, []).append(exclusion.reason)
        return {name: ", ".join(dict.fromkeys(filter(None, found))) for name, found in reasons.items()}

    @property
    def table(self) -> ImageTable:
        """The data set; after `setup`."""
        if self._table is None:
            raise RuntimeError("call setup() first")
        return self._table

    @property
    def splits(self) -> dict[str, Array]:
        """Sorted, disjoint int64 rows by name; after `setup`."""
        self.table  # noqa: B018 - says what is missing
        return self._splits

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels; after `setup`."""
        return self.table.class_names

    def pixels(self, split: str) -> Tensor:
        """The images of a split, not augmented: uint8 (n, C, H, W)."""
        return centre_crop(torch.from_numpy(self.table.images[self.splits[split]]), self.image_shape[1])

    def split_record(self) -> dict[str, Any]:
        """What says which image was in which split: plain values for JSON."""
        table = self.table
        return {
            "data": self.name,
            "digest": table.digest,
            "classes": list(table.class_names),
            "split_seed": self.split_seed,
            "excluded": self.excluded,
            "splits": {name: [table.names[row] for row in rows] for name, rows in self.splits.items()},
        }

    def save_splits(self, path: Path | str) -> None:
        """Writes `split_record` as JSON."""
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(self.split_record(), indent=1))

    def describe(self) -> str:
        """One line: name, sizes of the splits, resolution, classes."""
        sizes = ", ".join(f"{len(rows)} {name}" for name, rows in self.splits.items())
        names = self.class_names
        kinds = "class" if len(names) == 1 else "classes"
        classes = f"{len(names)} {kinds} ({', '.join(names[:10])}{', …' if len(names) > 10 else ''})"
        out = f"; {len(self.excluded):,} left out by {self.exclude}" if self.exclude is not None else ""
        return f"{self.name}: {sizes} images, {'×'.join(map(str, self.image_shape))}, {classes}{out}"

    def train_dataloader(self) -> EpochLoader:
        """Shuffled and augmented.

        Raises:
            AntherError: the batch is larger than this process's share of the training images.
        """
        rank, world = self._rank()
        rows = self.splits["train"]
        if self.drop_last and len(rows) // world < self.batch_size:
            raise AntherError(
                f"data.batch_size={self.batch_size} is more than the {len(rows) // world} training images of "
                f"{self.name} per process, so an epoch has no batch; choose a smaller one or data.drop_last=false."
            )
        view = TableView(self.table, rows, self.image_shape[1], self.augment, self.seed)
        weights = None
        if self.balanced:
            labels = self.table.labels[torch.from_numpy(rows)]
            weights = 1 / labels.bincount(minlength=len(self.class_names)).double()[labels]
        sampler = EpochSampler(len(rows), self.seed, rank, world, weights)
        return self._loader(view, sampler, self.batch_size, self.drop_last)

    def val_dataloader(self) -> EpochLoader:
        """In order, not augmented; each rank takes `rows[rank::world]`, nothing is repeated.

        Raises:
            AntherError: fewer images than processes.
        """
        return self._in_order("val")

    def test_dataloader(self) -> EpochLoader:
        """The split "test" where there is one, else "val"; in order, not augmented."""
        return self._in_order("test" if "test" in self.splits else "val")

    def _in_order(self, split: str) -> EpochLoader:
        rows, (rank, world) = self.splits[split], self._rank()
        if len(rows) < world:
            # A process without an image would not come to the sums that the others wait for.
            raise AntherError(
                f"{len(rows)} images of the split {split} are too few for {world} processes: set fewer "
                "trainer.devices, or a larger part in data.split."
            )
        view = TableView(self.table, rows, self.image_shape[1])
        return self._loader(view, EpochSampler(len(rows), None, rank, world), self.val_batch_size, drop_last=False)

    def _loader(self, view: TableView, sampler: EpochSampler, batch_size: int, drop_last: bool) -> EpochLoader:
        return EpochLoader(
            view,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=as_is,
            pin_memory=self._device() == "cuda",
            # Its own generator: making an iterator must not move the global one.
            generator=generator(self.seed),
        )

    def _device(self) -> str:
        """What the trainer computes on; a GPU that it leaves alone is left alone here, too."""
        return self.trainer.strategy.root_device.type if self.trainer else "cpu"

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
