"""The pictures of an analysis."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.analysis.cleansing import REASONS
from datamodules.analysis.measure import MEASURES, SIZES, Measured
from datamodules.base import ImageTable
from datamodules.exclusion import Exclusion
from diffusion.evaluation.plots import (
    BLUE,
    DPI,
    GREY,
    ORANGE,
    TILE,
    Cell,
    contact_sheet,
    in_lines,
    number,
    save,
    styled,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

COLOURS = {"red": "#c0392b", "green": "#2e8b57", "blue": BLUE, "grey": GREY}
COLUMNS = 8
MOST = 24  # pictures on a sheet


def draw(
    folder: Path, table: ImageTable, measured: Measured, summary: Mapping[str, Any], found: Sequence[Exclusion]
) -> dict[str, str]:
    """Draws everything into `plots/`; what an earlier analysis left there is removed.

    Returns:
        What each picture shows, by the name of its file without suffix, in the order of the page.
    """
    pictures: dict[str, tuple[str, Figure | None]] = {}
    with styled():
        pictures["images"] = ("Images of every split", _images(table, measured.frame))
        pictures["sizes"] = ("Sizes before resizing and cropping", _histograms(measured.frame, SIZES))
        pictures["resolutions"] = ("The most frequent resolutions", _resolutions(summary["resolutions"]))
        pictures["measures"] = ("Brightness, contrast, edges, entropy", _histograms(measured.frame, MEASURES))
        pictures["channels"] = ("Values of the channels", _channels(measured.histogram, summary["channels"]))
        pictures["labels"] = ("Images by label", _labels(summary["labels"]))
        if "attributes" in summary:
            pictures["attributes"] = ("Share of the images with each attribute", _attributes(summary["attributes"]))
        for reason in REASONS:
            sheet = _findings(table, measured.frame, reason, [finding for finding in found if finding.reason == reason])
            pictures[f"found_{reason}"] = (f"Found: {reason.replace('_', ' ')}", sheet)
        for stale in (folder / "plots").glob("*.png"):
            stale.unlink()
        for name, (_, figure) in pictures.items():
            if figure is not None:
                save(figure, folder / "plots" / f"{name}.png")
    return {name: what for name, (what, figure) in pictures.items() if figure is not None}


def _histograms(frame: "pd.DataFrame", columns: Mapping[str, tuple[str, str]]) -> "Figure":
    from matplotlib.figure import Figure

    across = min(len(columns), 2 if len(columns) == 4 else 3)
    down = -(-len(columns) // across)
    figure = Figure(figsize=(3.8 * across, 2.7 * down), dpi=DPI, layout="constrained")
    for (column, (title, unit)), axes in zip(
        columns.items(), figure.subplots(down, across, squeeze=False).flat, strict=False
    ):
        values = frame[column].to_numpy(float)
        axes.hist(values, bins=50, color=BLUE, alpha=0.85)
        axes.axvline(values.mean(), color=ORANGE, lw=1.5)
        axes.set_title(title, pad=16)
        _note(axes, f"mean {number(values.mean())}, deviation {number(values.std())}, N = {len(values):,}")
        axes.set(xlabel=unit, ylabel="images")
    return figure


def _note(axes: "Axes", text: str) -> None:
    axes.text(0, 1.02, text, transform=axes.transAxes, color=ORANGE, fontsize=8)


def _resolutions(resolutions: Mapping[str, Any]) -> "Figure":
    shown = resolutions["most_frequent"]
    title = f"The {len(shown)} most frequent of {resolutions['different']:,} resolutions"
    return _bars({f"{w} x {h}": {"": n} for w, h, n in shown}, title, "images")


def _labels(labels: Mapping[str, Mapping[str, int]]) -> "Figure":
    splits = list(labels)
    names = list(labels[splits[0]])
    table = {name: {split: labels[split][name] for split in splits} for name in names}
    return _bars(table, f"Images of {len(names)} {'class' if len(names) == 1 else 'classes'}", "images")


def _attributes(attributes: Mapping[str, Mapping[str, float]]) -> "Figure":
    from matplotlib.figure import Figure

    splits = list(attributes)
    names = sorted(attributes[splits[0]], key=lambda name: -attributes[splits[0]][name])
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(names)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for k, split in enumerate(splits):
        shares = [attributes[split][name] for name in names]
        axes.plot(shares, range(len(names)), "osD^v"[k % 5], color=(BLUE, ORANGE, GREY)[k % 3], ms=4, label=split)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(title="Attributes", xlabel="share of the split's images", xlim=(0, 1))
    axes.legend()
    return figure


def _bars(table: Mapping[str, Mapping[str, int]], title: str, unit: str) -> "Figure":
    """Stacked bars: by name, then by split."""
    from matplotlib.figure import Figure

    names = list(table)
    figure = Figure(figsize=(8, 1.3 + 0.2 * len(names)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(names))
    parts = list(next(iter(table.values())))
    for k, part in enumerate(parts):
        counts = np.array([table[name][part] for name in names], float)
        axes.barh(range(len(names)), counts, left=left, color=(BLUE, ORANGE, GREY)[k % 3], height=0.75, label=part)
        left += counts
    for place, total in enumerate(left):
        axes.annotate(f"{total:,.0f}", (total, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.grid(False, axis="y")
    axes.set(title=title, xlabel=unit)
    if parts != [""]:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _channels(histogram: np.ndarray, channels: Mapping[str, Mapping[str, float]]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7, 3), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for (name, known), shares in zip(channels.items(), histogram, strict=True):
        label = f"{name}: mean {known['mean']:.3f}, deviation {known['std']:.3f}"
        axes.stairs(shares, np.arange(257), color=COLOURS[name], label=label)
    axes.set(title="Pixel values, every image weighs the same", xlabel="value", ylabel="share of the pixels")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=8)
    return figure


def _images(table: ImageTable, frame: "pd.DataFrame", columns: int = COLUMNS) -> "Figure":
    # Spread evenly over the split, since neighbours are often of one class.
    rows, names = [], []
    for split, part in frame.groupby("split", sort=False):
        chosen = part.iloc[np.linspace(0, len(part) - 1, min(columns, len(part))).astype(int)]
        rows.append(
            [Cell([_tile(table, row)], label) for row, label in zip(chosen["row"], chosen["label"], strict=True)]
        )
        names.append(str(split))
    return contact_sheet("Images", f"{columns} of each split, spread evenly", rows, names)


def _findings(table: ImageTable, frame: "pd.DataFrame", reason: str, found: Sequence[Exclusion]) -> "Figure | None":
    rows = dict(zip(frame["name"], frame["row"], strict=True))
    visible = [finding for finding in found if finding.name in rows]
    if not visible:
        return None
    cells = []
    for finding in visible[:MOST]:
        names = [finding.name, *([finding.kept] if finding.kept else [])]
        caption = "\n".join([f"{finding.split}: {Path(finding.name).name}", finding.details])
        cells.append(Cell([_tile(table, rows[name]) for name in names], caption))
    said = REASONS[reason] + ("; below it the twin that stays" if visible[0].kept else "")
    note = f"{len(cells)} of {len(visible):,}: {said}"
    return contact_sheet(reason.replace("_", " ").capitalize(), note, in_lines(cells, COLUMNS))


def _tile(table: ImageTable, row: int) -> "Image.Image":
    from PIL import Image, ImageOps

    image = table.original(row)
    resample = Image.Resampling.NEAREST if max(image.size) < TILE else Image.Resampling.LANCZOS
    return ImageOps.pad(image, (TILE, TILE), resample, color="white")
