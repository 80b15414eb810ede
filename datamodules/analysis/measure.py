"""What can be measured on every image of a data set, and its summary."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.base import Array, ImageTable

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

# Column of the table: title, unit.
MEASURES: Mapping[str, tuple[str, str]] = {
    "brightness": ("brightness", "mean grey value, 0 to 255"),
    "contrast": ("contrast", "standard deviation of the grey values"),
    "edge_density": ("edge density", "mean Sobel magnitude, 0 to 1"),
    "entropy": ("entropy", "of the grey values' histogram, in bits"),
}
SIZES: Mapping[str, tuple[str, str]] = {
    "width": ("width", "pixels"),
    "height": ("height", "pixels"),
    "aspect": ("aspect", "width / height"),
}
CHUNK = 256
BAND = 64  # rows whose slopes are in memory at once
PIXELS = 2**27
"""As many are measured at once, each in about 12 bytes: 1.6 GB, five photos of 24 megapixels."""


@dataclass(frozen=True)
class Measured:
    """The measurements of a data set.

    Attributes:
        frame: a row per image: `row` in the table, `name`, `split`, `label`, the columns of `SIZES` and `MEASURES`,
            and `spread` (see `measure`).
        hashes: uint64 (n,), the perceptual hash of each row of the frame.
        histogram: float64 (channels, 256), share of the pixels with each value; every image weighs the same.
    """

    frame: "pd.DataFrame"
    hashes: Array
    histogram: Array


def measure_all(table: ImageTable, splits: Mapping[str, Array]) -> Measured:
    """Measures the images of all splits as they were before resizing and cropping, with a progress bar."""
    import pandas as pd
    from rich.console import Console
    from rich.progress import track

    rows = [(int(row), split) for split, part in splits.items() for row in part]
    channels = table.images.shape[1]

    def one(row: int) -> tuple[dict[str, Any], int, Array]:
        return measure(table.original(row), channels)

    records: list[dict[str, Any]] = []
    hashes = np.zeros(len(rows), np.uint64)
    histogram = np.zeros((channels, 256))
    starts = track(
        range(0, len(rows), CHUNK),
        description="measuring",
        transient=True,
        console=Console(stderr=True),
        disable=len(rows) < 2 * CHUNK,
    )
    for start in starts:
        part = rows[start : start + CHUNK]
        with ThreadPoolExecutor(_workers([_pixels(table, row) for row, _ in part])) as pool:
            for (row, split), (record, value, shares) in zip(part, pool.map(one, [r for r, _ in part]), strict=True):
                hashes[len(records)] = value
                histogram += shares
                known = {"row": row, "name": table.names[row], "split": split}
                records.append(known | {"label": table.class_names[int(table.labels[row])]} | record)
    return Measured(pd.DataFrame(records), hashes, histogram / len(rows))


def _pixels(table: ImageTable, row: int) -> int:
    from PIL import Image

    if not table.files:
        return int(np.prod(table.images.shape[2:]))
    with Image.open(table.files[row]) as image:
        return image.width * image.height


def _workers(pixels: Sequence[int]) -> int:
    """How many threads measure images of so many pixels: one for each core, if the largest fit in `PIXELS`."""
    return max(1, min(os.cpu_count() or 1, PIXELS // max(pixels)))


def measure(image: "Image.Image", channels: int) -> tuple[dict[str, Any], int, Array]:
    """The measurements of one image.

    Brightness, contrast, edge density and entropy are those of the grey image (ITU-R 601-2). The edge is the magnitude
    of the two Sobel derivatives, scaled so that the steepest possible step has 1. `spread` is the difference between
    an RGB pixel's largest and smallest value, at the 99th percentile: 0 for a photo without colour.

    Args:
        image: RGB.
        channels: 3, or 1 for a grey data set.

    Returns:
        The values, the perceptual hash (64 bits), and the share of each pixel value, float64 (channels, 256).
    """
    import imagehash
    from PIL import ImageChops

    grey, planes = image.convert("L"), image.split()
    size, values = image.width * image.height, np.arange(256)
    counts = np.array(grey.histogram())
    brightness = float(counts @ values / size)
    spread = ImageChops.subtract(reduce(ImageChops.lighter, planes), reduce(ImageChops.darker, planes))
    record = {
        "width": image.width,
        "height": image.height,
        "aspect": image.width / image.height,
        "brightness": brightness,
        "contrast": float(np.sqrt(counts @ (values - brightness) ** 2 / size)),
        "edge_density": _edge_density(np.asarray(grey)),
        "entropy": float(grey.entropy()),
        "spread": float(np.percentile(np.asarray(spread), 99)),
    }
    bits = imagehash.phash(grey).hash.ravel()
    shares = np.array([plane.histogram() for plane in ([grey] if channels == 1 else planes)], np.float64) / size
    return record, int(np.packbits(bits).view(">u8")[0]), shares


def _edge_density(grey: Array) -> float:
    """Of uint8 (H, W), band by band: in float64 the slopes of a photo take many times its own memory."""
    from scipy import ndimage

    total = 0.0
    for top in range(0, len(grey), BAND):
        first = max(top - 1, 0)  # one row more on either side, where there is one
        band = grey[first : top + BAND + 1] / 255
        slopes = [ndimage.sobel(band, axis)[top - first :][:BAND] / 4 for axis in (0, 1)]
        total += float(np.hypot(*slopes).sum())
    return float(total / np.sqrt(2) / grey.size)


def statistics(values: "Sequence[float] | pd.Series") -> dict[str, float]:
    """Mean, deviation (divided by n), extremes and quartiles."""
    array = np.asarray(values, np.float64)
    low, middle, high = np.quantile(array, [0.25, 0.5, 0.75])
    return {
        "mean": float(array.mean()),
        "std": float(array.std()),
        "min": float(array.min()),
        "quartile_1": float(low),
        "median": float(middle),
        "quartile_3": float(high),
        "max": float(array.max()),
    }


def summarise(measured: Measured, table: ImageTable, most: int = 20) -> dict[str, Any]:
    """Everything that the page and `analysis.json` say of the images, as plain values.

    Args:
        measured: from `measure_all`.
        table: that it was measured on.
        most: how many resolutions are named, the most frequent first.
    """
    frame = measured.frame
    resolutions = frame.groupby(["width", "height"]).size().sort_values(ascending=False, kind="stable")
    values = np.arange(256) / 255
    means = measured.histogram @ values
    deviations = np.sqrt(np.maximum(measured.histogram @ values**2 - means**2, 0))
    names = ("red", "green", "blue") if len(means) == 3 else ("grey",)
    summary: dict[str, Any] = {
        "images": {split: int(n) for split, n in frame["split"].value_counts(sort=False).items()},
        "sizes": {column: statistics(frame[column]) for column in SIZES},
        "resolutions": {
            "different": len(resolutions),
            "most_frequent": [[int(w), int(h), int(n)] for (w, h), n in resolutions.head(most).items()],
        },
        "measures": {column: statistics(frame[column]) for column in MEASURES},
        "channels": {
            name: {"mean": float(mean), "std": float(std)}
            for name, mean, std in zip(names, means, deviations, strict=True)
        },
        "empty_classes": [name for label, name in enumerate(table.class_names) if not (table.labels == label).any()],
        "labels": {
            split: {name: int((part["label"] == name).sum()) for name in table.class_names}
            for split, part in frame.groupby("split", sort=False)
        },
    }
    if table.attributes is not None:
        known = table.attributes.numpy()
        summary["attributes"] = {
            split: {
                name: float(share)
                for name, share in zip(table.attribute_names, known[part["row"]].mean(0), strict=True)
            }
            for split, part in frame.groupby("split", sort=False)
        }
    return summary
