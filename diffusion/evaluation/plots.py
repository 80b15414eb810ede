"""The pictures of an evaluation, from the files of its folder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten, wrap
from typing import TYPE_CHECKING, Any, Literal

from diffusion.files import atomic
from diffusion.threads import as_many_as_before

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure
    from PIL import Image
    from torch import Tensor

DPI = 144
TILE = 128  # pixels of a picture in a sheet, about
BLUE, ORANGE, GREY = "#33658a", "#d1603d", "#8a8a8a"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "text.parse_math": False,  # a prompt may hold a dollar
}
MARKERS = "os^DvP"
EMBEDDED = 2000  # images on the map of embeddings; a choice of so many where there are more
UMAP_MINIMUM = 16  # images; UMAP's default neighbourhood is 15


@dataclass(frozen=True)
class Score:
    """A per-image score: the words for it.

    Attributes:
        title: its name.
        unit: what its numbers are.
        short: its name where there is little room.
        better: the direction of good images; None where there is none.
    """

    title: str
    unit: str
    short: str
    better: Literal["higher", "lower"] | None = None


SCORES: Mapping[str, Score] = {
    "clip_score": Score("CLIP score", "cosine of image and prompt", "CLIP", "higher"),
    "realism": Score("realism", "above 1: inside the manifold of the real images", "realism", "higher"),
    "nearest_distance": Score("distance to the nearest training image", "L2", "nearest"),
    "inception_entropy": Score("entropy of the Inception prediction", "nats", "entropy"),
    "classifier_confidence": Score("classifier confidence", "probability of what it predicts", "confidence"),
    "psnr": Score("peak signal-to-noise ratio", "dB, to the original", "PSNR", "higher"),
    "ssim": Score("structural similarity", "to the original, 1 at best", "SSIM", "higher"),
    "uniqueness": Score("uniqueness", "1: the most unique image", "unique"),
    "representativeness": Score(
        "representativeness, FiftyOne Brain", "1: farthest from its cluster's centre", "repr. (Brain)"
    ),
    "representativeness_closeness": Score(
        "representativeness, closeness", "1: closest to its cluster's centre", "closeness"
    ),
}


def draw_plots(
    folder: Path,
    real_image: "Callable[[int], Tensor] | None" = None,
    original: "Callable[[int], Tensor] | None" = None,
) -> list[Path]:
    """Draws into `plots/` whatever the folder has the columns for; pictures of an earlier call are replaced.

        grid             the first images, a row per prompt
        histograms       every per-image score
        prompts          mean and deviation of the CLIP score, else of realism, per prompt
        best, worst      the ends of the same score
        reconstructions  originals above what came back of them
        nearest          generated images above their nearest training images, the closest pairs first
        classes          how many images the classifier accepts per digit, and declines
        accepted, declined   the surest and the least sure of each
        confused         images between two digits
        embedding_prompt, embedding_score   UMAP of the embeddings (McInnes et al., 2018, arXiv 1802.03426), seeded;
                         their two principal components below 16 images

    Deviations are those of the images at hand (ddof 0), so one image has 0.

    Args:
        folder: of an evaluation.
        real_image: row of the data table -> that image, (C, H, W) in [-1, 1]; None leaves `nearest` out.
        original: number of an image -> what it is a reconstruction of, likewise.

    Returns:
        The files, in the order above.
    """
    from diffusion.curation.records import read

    frame, units = read(folder), _units(folder)
    pictures: dict[str, Figure | None] = {}
    with styled():
        pictures["grid"] = _grid(folder, frame)
        pictures["histograms"] = _histograms(frame, units)
        pictures["prompts"] = _prompts(frame, units)
        pictures["best"], pictures["worst"] = _ends(folder, frame, units)
        pictures["reconstructions"] = None if original is None else _reconstructions(folder, frame, original)
        pictures["nearest"] = None if real_image is None else _nearest(folder, frame, units, real_image)
        pictures |= _decisions(folder, frame)
        pictures |= _embeddings(folder, frame, units)
        paths = []
        for name, figure in pictures.items():
            path = folder / "plots" / f"{name}.png"
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                save(figure, path)
                paths.append(path)
    return paths


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))  # type: ignore[no-untyped-call]


@contextmanager
def styled() -> Iterator[None]:
    """Figures made in this block look like those of an evaluation."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        yield


def main_score(frame: "pd.DataFrame") -> str | None:
    """The column that says how good an image is: the CLIP score, else realism, else None."""
    return next((name for name in ("clip_score", "realism") if name in frame and frame[name].notna().any()), None)


def ranked(frame: "pd.DataFrame", column: str) -> "pd.DataFrame":
    """The rows that have a value, the best image first; equals in the order of their ids."""
    lowest_first = SCORES[column].better == "lower"
    return frame.dropna(subset=[column]).sort_values(column, ascending=lowest_first, kind="stable")


def by_prompt(frame: "pd.DataFrame", column: str) -> "pd.DataFrame":
    """Mean, deviation (ddof 0) and number of a score's values for each prompt: columns `mean`, `std`, `count`.

    The index is the prompts in the order of their first images.
    """
    groups = frame.dropna(subset=["prompt", column]).groupby("prompt", sort=False)[column]
    return groups.agg(mean="mean", std=lambda values: values.std(ddof=0), count="count")


def number(value: float) -> str:
    """Four digits, without an exponent where that can be read."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _units(folder: Path) -> dict[str, str]:
    """What the numbers of each score are: as the record of this run says it, where it does."""
    from diffusion.evaluation.report import read_metrics, split_key

    units = {name: score.unit for name, score in SCORES.items()}
    if (folder / "metrics.json").exists():
        for key, result in read_metrics(folder)[1].items():
            part = split_key(key)
            if part.name == "clip_score" and part.scorer:
                units["clip_score"] = f"cosine of image and prompt by {part.scorer}"
            elif part.name == "nearest_distance":
                units["nearest_distance"] = str(result.protocol.get("distance", "L2"))
    return units


# Charts ---------------------------------------------------------------------------------------------------------------


def _histograms(frame: "pd.DataFrame", units: Mapping[str, str]) -> "Figure | None":
    import numpy as np
    from matplotlib.figure import Figure

    columns = [name for name in SCORES if name in frame and np.isfinite(frame[name].to_numpy(float)).any()]
    if not columns:
        return None
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    figure = Figure(figsize=(3.6 * across, 2.6 * down), dpi=DPI, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flat
    for name, axes in zip(columns, panels, strict=False):
        values = frame[name].to_numpy(float)
        values = values[np.isfinite(values)]
        axes.hist(values, bins=int(np.clip(np.sqrt(len(values)), 5, 40)), color=BLUE, alpha=0.85, edgecolor="white")
        axes.axvline(values.mean(), color=ORANGE, lw=1.5)
        axes.set_title(SCORES[name].title, pad=16)
        axes.text(
            0,
            1.02,
            f"mean {number(values.mean())}, deviation {number(values.std())}, N = {len(values)}",
            transform=axes.transAxes,
            color=ORANGE,
            fontsize=8,
        )
        axes.set(xlabel=units[name], ylabel="images")
        axes.yaxis.get_major_locator().set_params(integer=True)
    for axes in panels:
        axes.set_axis_off()
    return figure


def _prompts(frame: "pd.DataFrame", units: Mapping[str, str], most: int = 40) -> "Figure | None":
    from matplotlib.figure import Figure

    column = main_score(frame)
    if column is None or not frame["prompt"].notna().any():
        return None
    every = by_prompt(frame, column).sort_values("mean", ascending=False, kind="stable")
    if every.empty:
        return None
    shown = every if len(every) <= most else every.iloc[[*range(most // 2), *range(len(every) - most // 2, len(every))]]
    labels = [shorten(str(prompt), 48, placeholder=" …") for prompt in shown.index]
    figure = Figure(figsize=(8, 1.2 + 0.26 * len(shown)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))
    axes.barh(places, shown["mean"], xerr=shown["std"], height=0.7, color=BLUE, alpha=0.85, ecolor=GREY, capsize=2)
    middle = frame[column].mean()
    axes.axvline(middle, color=ORANGE, lw=1.2, ls="--")
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    for place, (mean, std, count) in enumerate(shown.itertuples(index=False)):
        axes.annotate(
            f"{mean:.3f} ± {std:.3f}  n = {count}",
            (max(mean + std, 0), place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    axes.margins(x=0.28, y=0.02)
    part = "" if len(shown) == len(every) else f": the {most // 2} best and {most // 2} worst of {len(every)} prompts"
    axes.set_title(f"{SCORES[column].title} by prompt{part}", pad=16)
    axes.annotate(
        f"dashed: mean of all images, {number(middle)}",
        (0, 1),
        (0, 4),
        xycoords="axes fraction",
        textcoords="offset points",
        color=ORANGE,
        fontsize=8,
    )
    # In lines: the name of a scorer alone may be half as wide as the figure.
    axes.set_xlabel(f"{units[column]}\nmean and deviation over the prompt's images")
    return figure


def _embeddings(
    folder: Path, frame: "pd.DataFrame", units: Mapping[str, str], seed: int = 0
) -> "dict[str, Figure | None]":
    import numpy as np

    from diffusion.evaluation.embeddings import open_rows

    pictures: dict[str, Figure | None] = {"embedding_prompt": None, "embedding_score": None}
    if len(frame) < 3 or not (folder / "embeddings.npy").exists():
        return pictures
    every, total = open_rows(folder), len(frame)
    if every.shape[1] < 2:
        return pictures
    if total > EMBEDDED:
        chosen = np.sort(np.random.default_rng(seed).permutation(total)[:EMBEDDED])
        points, frame = every[chosen], frame.iloc[chosen]
    else:
        points = every[:]
    if len(points) < UMAP_MINIMUM:
        from sklearn.decomposition import PCA

        method, names = f"PCA, as {len(points)} images are too few for UMAP", ("first component", "second component")
        places = PCA(2, random_state=seed).fit_transform(points)
    else:
        from umap import UMAP

        method, names = "UMAP", ("UMAP 1", "UMAP 2")
        neighbours = min(15, len(points) - 1)
        with as_many_as_before():
            places = UMAP(n_neighbors=neighbours, init="pca", random_state=seed, n_jobs=1).fit_transform(points)
    what = next(
        (name for name in ("prompt", "label", "final_label") if name in frame and frame[name].notna().any()), None
    )
    score = next((name for name in SCORES if name in frame and frame[name].notna().any()), None)
    title = f"Embeddings of {len(frame)}{f' of {total}' if len(frame) < total else ''} images ({method})"
    if what:
        pictures["embedding_prompt"] = _by_class(places, frame[what].tolist(), f"{title} by {what}", names)
    if score:
        values = frame[score].to_numpy(float)
        pictures["embedding_score"] = _by_score(places, values, score, units[score], title, names)
    return pictures


def _by_class(places: "np.ndarray", classes: list[Any], title: str, names: tuple[str, str], most: int = 40) -> "Figure":
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    known = list(dict.fromkeys(c for c in classes if isinstance(c, str)))
    figure = Figure(figsize=(9, max(5, 1 + 0.2 * min(len(known), most))), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    palette = colormaps["tab10" if len(known) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    rows: dict[str | None, list[int]] = {name: [] for name in [*known[:most], None]}
    for row, name in enumerate(classes):
        rows[name if name in rows else None].append(row)
    for k, name in enumerate(known[:most]):
        colour, marker = palette[k % len(palette)], MARKERS[k // len(palette) % len(MARKERS)]
        label = shorten(name, 44, placeholder=" …")
        x, y = places[rows[name]].T
        axes.scatter(x, y, s=22, color=colour, marker=marker, alpha=0.85, lw=0, label=label)
    if rows[None]:
        x, y = places[rows[None]].T
        axes.scatter(x, y, s=12, color=GREY, alpha=0.4, lw=0, label="others", zorder=0)
    axes.set(title=title, xlabel=names[0], ylabel=names[1])
    # Not `loc="outside"`, under which the layout shrinks the axes to nothing for long prompts.
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return figure


def _by_score(
    places: "np.ndarray", values: "np.ndarray", score: str, unit: str, title: str, names: tuple[str, str]
) -> "Figure":
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    low, high = np.nanquantile(values, [0.02, 0.98])  # one outlier must not take all the colours
    x, y = places.T
    drawn = axes.scatter(x, y, c=values, s=22, cmap="viridis", vmin=low, vmax=high, lw=0, plotnonfinite=True)
    figure.colorbar(drawn, ax=axes, label=f"{SCORES[score].title} ({unit})", extend="both")
    axes.set(title=f"{title} by {SCORES[score].title}", xlabel=names[0], ylabel=names[1])
    return figure


# Sheets of images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A place on a contact sheet: pictures and what stands below them."""

    pictures: "Sequence[Image.Image]"  # one above the other
    caption: str = ""


def _grid(folder: Path, frame: "pd.DataFrame", rows: int = 12, columns: int = 8) -> "Figure | None":
    if frame.empty:
        return None
    prompts = list(dict.fromkeys(p for p in frame["prompt"] if isinstance(p, str)))
    if not prompts:
        shown = frame.head(columns * columns)
        cells = [Cell([_picture(folder, file)]) for file in shown["file"]]
        return contact_sheet("Generated images", _of(len(shown), len(frame)), in_lines(cells, columns))
    groups = [frame[frame["prompt"] == prompt] for prompt in prompts]
    if max(map(len, groups)) <= 2:
        shown = frame.head(columns * (rows // 2))
        cells = [Cell([_picture(folder, row.file)], str(row.prompt)) for row in shown.itertuples()]
        return contact_sheet("Generated images by prompt", _of(len(shown), len(frame)), in_lines(cells, columns))
    table = [[Cell([_picture(folder, file)]) for file in group["file"][:columns]] for group in groups[:rows]]
    note = f"the first {max(map(len, table))} images of {_of(len(table), len(prompts), 'prompts')}"
    return contact_sheet("Generated images by prompt", note, table, prompts[:rows])


def _ends(
    folder: Path, frame: "pd.DataFrame", units: Mapping[str, str], most: int = 24, columns: int = 8
) -> "tuple[Figure | None, Figure | None]":
    column = main_score(frame)
    if column is None:
        return None, None
    order = ranked(frame, column)
    count = min(most, max(1, len(order) // 2))

    def sheet(rows: "pd.DataFrame", word: str) -> "Figure":
        captions = [
            "\n".join([f"{value:.3f}", *([prompt] if isinstance(prompt, str) else [])])
            for value, prompt in zip(rows[column], rows["prompt"], strict=True)
        ]
        cells = [Cell([_picture(folder, file)], text) for file, text in zip(rows["file"], captions, strict=True)]
        note = f"{units[column]}; {_of(count, len(order))}, the {word} first"
        return contact_sheet(f"The {word} images by {SCORES[column].title}", note, in_lines(cells, columns))

    return sheet(order.head(count), "best"), sheet(order.tail(count).iloc[::-1], "worst")


def _reconstructions(
    folder: Path, frame: "pd.DataFrame", original: "Callable[[int], Tensor]", most: int = 24, columns: int = 8
) -> "Figure":
    from diffusion.images import to_pil

    cells = [
        Cell(
            [to_pil(original(k)).convert("RGB"), _picture(folder, row.file)],
            f"PSNR {row.psnr:.1f} dB\nSSIM {row.ssim:.2f}\nimage {row.id}",
        )
        for k, row in enumerate(frame.head(most).itertuples())
    ]
    note = f"above: the original, below: what came back; the first {len(cells)} of {len(frame)} images."
    return contact_sheet("Reconstructions", note, in_lines(cells, columns))


def _nearest(
    folder: Path,
    frame: "pd.DataFrame",
    units: Mapping[str, str],
    real_image: "Callable[[int], Tensor]",
    most: int = 24,
    columns: int = 8,
) -> "Figure | None":
    from diffusion.images import to_pil

    if not {"nearest_distance", "nearest_row"} <= set(frame) or not frame["nearest_distance"].notna().any():
        return None
    pairs = frame.dropna(subset=["nearest_distance"]).sort_values("nearest_distance", kind="stable").head(most)
    cells = [
        Cell(
            [_picture(folder, row.file), to_pil(real_image(int(row.nearest_row))).convert("RGB")],
            f"distance {row.nearest_distance:.2f}\nof image {row.id}\nto {row.nearest_real}",
        )
        for row in pairs.itertuples()
    ]
    note = (
        "above: a generated image, below: the training image nearest to it; the distance is "
        f"{units['nearest_distance']}, from the id of the one to the name of the other; "
        f"the {len(cells)} closest of {len(frame)} pairs. A pair that looks the same is a memorised image."
    )
    return contact_sheet("Nearest training images", note, in_lines(cells, columns))


def _decisions(folder: Path, frame: "pd.DataFrame", most: int = 40, columns: int = 10) -> "dict[str, Figure | None]":
    """What a classifier made of the images: counts, and sheets of what it accepts, declines and confuses."""
    names = ("classes", "accepted", "declined", "confused")
    if "rejection_type" not in frame:
        return dict.fromkeys(names)

    def sheet(title: str, rows: "pd.DataFrame", captions: Sequence[str], note: str) -> "Figure | None":
        if rows.empty:
            return None
        pairs = zip(rows["file"], captions, strict=True)
        cells = [Cell([_picture(folder, file)], caption) for file, caption in pairs]
        return contact_sheet(title, note, in_lines(cells, columns))

    def captioned(rows: "pd.DataFrame", column: str) -> list[str]:
        return [f"{name} {value:.2f}" for name, value in zip(rows[column], rows["classifier_confidence"], strict=True)]

    yes = frame[~frame["is_idk"]].sort_values("classifier_confidence", ascending=False, kind="stable")
    no = frame[frame["is_idk"]].sort_values("classifier_confidence", kind="stable")
    unsure = frame.sort_values("margin", kind="stable").head(most)
    # The surest of every digit, not forty ones.
    surest = yes.groupby("final_label").head(most // 10).sort_values("final_label", kind="stable")
    declined = no.head(most)
    between = [f"{row.pseudo_label} or {row.runner_up}" for row in unsure.itertuples()]
    kinds = [f"{row.pseudo_label}? {row.rejection_type}" for row in declined.itertuples()]
    return {
        "classes": _classes(frame),
        "accepted": sheet(
            "Accepted digits", surest, captioned(surest, "final_label"), f"the surest of each, of {len(yes)} accepted"
        ),
        "declined": sheet(
            "Declined digits", declined, kinds, f"{_of(len(declined), len(no))} declined; the best guess, and the stage"
        ),
        "confused": sheet(
            "Most confused digits", unsure, between, "the two likeliest digits, closest in probability first"
        ),
    }


def _classes(frame: "pd.DataFrame") -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    digits = [str(k) for k in range(10)]
    bottom = [0] * len(digits)
    for kind, colour, said in (
        ("none", BLUE, "accepted"),
        ("soft", ORANGE, "declined, not sure enough"),
        ("hard", GREY, "declined, IDK by itself"),
    ):
        found = frame[frame["rejection_type"] == kind]["pseudo_label"].value_counts()
        heights = [int(found.get(digit, 0)) for digit in digits]
        bars = axes.bar(digits, heights, bottom=bottom, color=colour, label=f"{said}: {sum(heights)}", width=0.75)
        axes.bar_label(bars, [str(h) if h else "" for h in heights], label_type="center", fontsize=7, color="white")
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.grid(False, axis="x")
    axes.set(title=f"What the classifier sees in {len(frame)} images", xlabel="best digit", ylabel="images")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return figure


def _of(shown: int, total: int, what: str = "images") -> str:
    return f"all {total} {what}" if shown == total else f"{shown} of {total} {what}"


def in_lines(cells: list[Cell], columns: int) -> list[list[Cell]]:
    """Cells row by row."""
    return [cells[k : k + columns] for k in range(0, len(cells), columns)]


def _picture(folder: Path, file: str) -> "Image.Image":
    from PIL import Image

    with Image.open(folder / file) as image:
        return image.convert("RGB")


def contact_sheet(title: str, note: str, rows: list[list[Cell]], names: Sequence[str] = ()) -> "Figure":
    """Cells row by row, every picture at the size of the first, small ones by repetition of pixels."""
    import numpy as np
    from matplotlib.figure import Figure
    from PIL import Image

    first = rows[0][0].pictures[0]
    factor = TILE / max(first.size)
    factor = max(1, round(factor)) if factor >= 1 else factor
    width, height = round(first.width * factor), round(first.height * factor)
    resample = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    gap, line, margin = 8, 17, 16
    name_width = 170 if names else 0
    across = max(len(row) for row in rows)
    page_width = max(2 * margin + name_width + across * (width + gap) - gap, 560)
    notes = wrap(note, (page_width - 2 * margin) // 9)
    # A caption's first line may be a number, which stands alone.
    captions = [
        [[part for text in cell.caption.split("\n") for part in _clipped(text, width // 8, 3)] for cell in row]
        for row in rows
    ]
    top = margin + 30 + line * len(notes) + 6
    tops = [top]
    for row, texts in zip(rows, captions, strict=True):
        stacked = max(len(cell.pictures) for cell in row) * (height + 3)
        tops.append(tops[-1] + stacked + line * max(map(len, texts)) + gap)
    page: np.ndarray = np.full((tops[-1] + margin - gap, page_width, 3), 255, np.uint8)
    figure = Figure(figsize=(page.shape[1] / DPI, page.shape[0] / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.text(margin, margin, title, fontsize=11, weight="bold", va="top")
    axes.text(margin, margin + 30, "\n".join(notes), fontsize=8, color="#555555", va="top")
    for k, (row, texts) in enumerate(zip(rows, captions, strict=True)):
        if names:
            text = "\n".join(_clipped(names[k], name_width // 9, 4))
            axes.text(margin, tops[k] + height / 2, text, fontsize=8, va="center")
        for c, (cell, parts) in enumerate(zip(row, texts, strict=True)):
            left, down = margin + name_width + c * (width + gap), tops[k]
            for picture in cell.pictures:
                page[down : down + height, left : left + width] = np.asarray(picture.resize((width, height), resample))
                down += height + 3
            axes.text(left, down + 1, "\n".join(parts), fontsize=7, va="top")
    axes.imshow(page, interpolation="nearest", aspect="auto", extent=(0, page_width, page.shape[0], 0))
    return figure


def _clipped(text: str, width: int, lines: int) -> list[str]:
    return wrap(text, max(width, 8), max_lines=lines, placeholder=" …")
