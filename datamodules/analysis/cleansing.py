"""Images that a data set might do without: what is wrong with them, as a list for a person to read."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.analysis.measure import Measured
from datamodules.base import Array, ImageTable
from datamodules.exclusion import Exclusion

if TYPE_CHECKING:
    import pandas as pd

REASONS: Mapping[str, str] = {
    "unreadable": "the file cannot be decoded",
    "too_large": "the file declares more pixels than a photograph has, and is not decoded",
    "non_finite": "the file has values that are no numbers",
    "too_small": "the short side is less than the size that images are decoded to",
    "odd_aspect": "far from square, so that the central square shows little of it",
    "grayscale": "without colour, in a data set with colours",
    "exact_duplicate": "the same pixels as another image",
    "near_duplicate": "another image after compression, resizing or a change of brightness",
    "dark": "even its brightest parts are dark",
    "light": "even its darkest parts are light",
    "blurry": "no sharp edge",
    "low_information": "hardly more than one grey value",
    "odd_size": "much larger or smaller than the others",
}
# What cleanvision calls them.
SEEN_BY_CLEANVISION = {"odd_aspect": "odd_aspect_ratio"} | {
    name: name for name in ("dark", "light", "blurry", "low_information", "odd_size")
}
# A twin in one of these stays rather than one further on.
PRECEDENCE = ("test", "val", "train")
SIDE = 32


@dataclass(frozen=True)
class Limits:
    """Where a finding begins.

    Attributes:
        odd_aspect: ratio of the short to the long side, below which an image is odd.
        grey: `spread` (see `measure`) up to which an image has no colour, in levels of 255.
        hash_bits: bits of 64 in which the perceptual hashes of near duplicates may differ.
        difference: root mean square difference of near duplicates at 32 x 32, in levels of 255.
    """

    odd_aspect: float = 0.35
    grey: float = 8.0
    hash_bits: int = 6
    difference: float = 10.0


class _Originals:
    """The images as cleanvision wants to be given them."""

    def __init__(self, table: ImageTable, rows: Sequence[int]) -> None:
        self.table, self.rows = table, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> tuple[Any]:
        return (self.table.original(self.rows[k]),)


def find(table: ImageTable, measured: Measured, side: int, limits: Limits, reasons: Collection[str]) -> list[Exclusion]:
    """Every finding; an image may have several.

    Twins: one that goes anyway, for another of `reasons`, goes first, wherever it is; else both would go. Of the others
    the one in "test" stays, else the one in "val", since a training image that is also a test image spoils the test;
    then the larger one, and the first by name. Files that were decoded are looked at as they are, not as the table has
    them. Dark, light, blurry, of low information and of odd size or aspect is what cleanvision says is; exact
    duplicates are by its checksum of the pixels. Near duplicates are pairs whose perceptual hashes (imagehash's pHash)
    are close, and whose pixels are, which hashes of simple pictures do not say.

    Args:
        table: the data set.
        measured: of its images.
        side: that images are decoded to.
        limits: see `Limits`.
        reasons: for which an image is put on the list.
    """
    frame = measured.frame
    found = list(table.unreadable)

    def add(reason: str, rows: Iterable[int], details: "pd.Series") -> None:
        found.extend(Exclusion(frame["name"][k], reason, details[k], split=frame["split"][k]) for k in rows)

    sizes = frame["width"].astype(str) + " x " + frame["height"].astype(str)
    if table.files:
        small = np.flatnonzero(frame[["width", "height"]].min(axis=1) < side)
        add("too_small", small, sizes + f" pixels, below {side}")
    grey = (frame["spread"] <= limits.grey).to_numpy()
    # Where most images are grey, grey is what they are.
    if table.images.shape[1] == 3 and grey.mean() < 0.5:
        add("grayscale", np.flatnonzero(grey), frame["spread"].map(lambda v: f"channels differ by {v:.0f} of 255"))
    issues, same = _cleanvision(table, frame, limits)
    details = {"odd_aspect": sizes + " pixels", "odd_size": sizes + " pixels"}
    for reason, column in SEEN_BY_CLEANVISION.items():
        scores = issues[f"{column}_score"].map(lambda score: f"score {score:.3f}")
        add(reason, np.flatnonzero(issues[f"is_{column}_issue"]), details.get(reason, scores))
    order = _by_precedence(frame, {finding.name for finding in found if finding.reason in reasons})
    rank = np.argsort(order)
    # One pair for each that goes, not all pairs of a set: thousands of copies of a placeholder would fill the memory.
    stars = ((kept, k) for group in same for kept in [min(group, key=rank.__getitem__)] for k in group)
    for kept, gone in _twins(order, stars):
        found.append(_twin(frame, "exact_duplicate", "the same pixels", kept, gone))
    alike = {finding.name for finding in found if finding.reason == "exact_duplicate"}
    left = order[~frame["name"].iloc[order].isin(alike).to_numpy()]
    for kept, gone, value in near_twins(table, frame["row"].to_numpy()[left], measured.hashes[left], limits):
        difference = f"differs by {value:.1f} of 255"
        found.append(_twin(frame, "near_duplicate", difference, int(left[kept]), int(left[gone])))
    return found


def _twin(frame: "pd.DataFrame", reason: str, details: str, kept: int, gone: int) -> Exclusion:
    one, other = frame.iloc[kept], frame.iloc[gone]
    if one["split"] != other["split"]:
        details += f"; its twin is in {one['split']}"
    if one["label"] != other["label"]:
        details += f"; its twin is labelled {one['label']}, it {other['label']}"
    return Exclusion(other["name"], reason, details, kept=one["name"], split=other["split"])


def _cleanvision(table: ImageTable, frame: "pd.DataFrame", limits: Limits) -> "tuple[pd.DataFrame, list[list[int]]]":
    """Its table of findings, a row per image, and the sets of images with the same pixels."""
    from cleanvision import Imagelab

    lab = Imagelab(torchvision_dataset=_Originals(table, frame["row"].tolist()), verbose=False)
    kinds: dict[str, dict[str, float]] = {column: {} for column in SEEN_BY_CLEANVISION.values()}
    kinds["odd_aspect_ratio"] = {"threshold": limits.odd_aspect}
    lab.find_issues(kinds | {"exact_duplicates": {}}, n_jobs=1, verbose=False)
    sets = [sorted(map(int, group)) for group in lab.info["exact_duplicates"]["sets"]]
    # Its checksum does not know the shape.
    shapes = list(zip(frame["width"], frame["height"], strict=True))
    return lab.issues, [
        [k for k in group if shapes[k] == shape] for group in sets for shape in {shapes[k] for k in group}
    ]


def _by_precedence(frame: "pd.DataFrame", listed: set[str]) -> Array:
    """Positions in the frame, those that rather stay first."""
    keys = [
        (name in listed, PRECEDENCE.index(split) if split in PRECEDENCE else len(PRECEDENCE), -width * height, name)
        for name, split, width, height in zip(
            frame["name"], frame["split"], frame["width"], frame["height"], strict=True
        )
    ]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def _twins(order: Array, pairs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(stays, goes) such that what goes is a twin of what stays, and no two that stay are twins."""
    neighbours: dict[int, set[int]] = {}
    for a, b in pairs:
        if a != b:
            neighbours.setdefault(a, set()).add(b)
            neighbours.setdefault(b, set()).add(a)
    rank = {int(k): place for place, k in enumerate(order)}
    gone: set[int] = set()
    for k in sorted(neighbours.keys() & rank.keys(), key=rank.__getitem__):
        if k not in gone:
            for other in sorted((neighbours[k] & rank.keys()) - gone, key=rank.__getitem__):
                if rank[other] > rank[k]:
                    gone.add(other)
                    yield k, other


def near_twins(
    table: ImageTable, rows: Array, hashes: Array, limits: Limits, chunk: int = 256
) -> Iterator[tuple[int, int, float]]:
    """Positions (stays, goes) in `rows` of images that show the same picture; no two that stay do.

    What went is compared with nothing more, so thousands of copies of one picture are as many comparisons, and as many
    pairs.

    Args:
        table: the data set.
        rows: of the table, those that rather stay first.
        hashes: uint64, one per row.
        limits: see `Limits`.
        chunk: rows whose hashes are compared with all others at once.

    Yields:
        Both positions, and the difference in levels of 255.
    """
    from rich.console import Console
    from rich.progress import track

    small = np.empty((len(rows), SIDE, SIDE, 3), np.uint8)  # memory is taken for what is written only
    made = np.zeros(len(rows), bool)
    gone = np.zeros(len(rows), bool)
    starts = track(
        range(0, len(hashes), chunk),
        description="near duplicates",
        transient=True,
        console=Console(stderr=True),
        disable=len(hashes) < 2 * chunk,
    )
    for start in starts:
        some = start + np.flatnonzero(~gone[start : start + chunk])
        close = np.bitwise_count(hashes[some, None] ^ hashes[None, start:]) <= limits.hash_bits
        for k, row in zip(some, close, strict=True):
            others = start + np.flatnonzero(row)
            others = others[(others > k) & ~gone[others]]
            if gone[k] or not len(others):
                continue
            for other in (k, *others):
                if not made[other]:
                    small[other], made[other] = thumbnail(table, int(rows[other])), True
            for part in np.array_split(others, -(-len(others) // 1024)):
                differences = _differences(small[[k]], small[part])
                for other, value in zip(part, differences, strict=True):
                    if value <= limits.difference:
                        gone[other] = True
                        yield int(k), int(other), float(value)


def thumbnail(table: ImageTable, row: int) -> Array:
    """The original of a row as uint8 (32, 32, 3)."""
    from PIL import Image

    return np.asarray(table.original(row).resize((SIDE, SIDE), Image.Resampling.BOX))


def _differences(some: Array, others: Array) -> Array:
    """Root mean square difference of each pair, less the mean: another brightness makes no other picture."""
    apart = some.astype(np.float32) - others
    differences: Array = apart.std((1, 2, 3))
    return differences
