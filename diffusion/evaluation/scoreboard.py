"""One table of models that may be compared: the same reals, the same number of images.

python -m diffusion.evaluation.scoreboard [RUNS_FOLDER] [--picture FILE] [--csv FILE] [--markdown]
"""

import argparse
import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion import cli
from diffusion.errors import AntherError
from diffusion.evaluation.distribution import VERDICTS
from diffusion.evaluation.metric import Result
from diffusion.evaluation.plots import BLUE, DPI, GREY, ORANGE, number, save, styled
from diffusion.evaluation.report import TITLES, read_metrics, split_key
from diffusion.evaluation.results import run_folders
from diffusion.files import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = ("fid", "kid", "is", "diversity")
SPREADS = {"kid": "kid_std", "is": "is_std"}


@dataclass(frozen=True)
class Setting:
    """What two evaluations must share for their numbers to be comparable.

    Attributes:
        reals: which real images: of which data, by content, and which of them.
        n: generated images.
        n_real: real ones.
        image_shape: (C, H, W) of both.
        weights: hash of the Inception's.
        originals: which images the models gave back; None where they drew.
        digest: of the data that the reals are from; it follows from them.
        split: what the first run of the group calls the reals: a matter of words.
        reconstructed: what it calls the originals.
    """

    reals: str
    n: int
    n_real: int
    image_shape: tuple[int, ...]
    weights: str
    originals: str | None
    digest: str = field(compare=False)
    split: str = field(compare=False)
    reconstructed: str | None = field(compare=False)


@dataclass(frozen=True)
class Entry:
    """One evaluation on the board.

    Attributes:
        model: name of the experiment.
        run: folder of the evaluation, below the folder of the runs.
        facts: of the generation.
        results: by name of the metric.
    """

    model: str
    run: str
    facts: Mapping[str, Any]
    results: Mapping[str, Result]

    def value(self, metric: str) -> float | None:
        """A metric's value, where there is one."""
        return self.results[metric].value if metric in self.results else None

    @property
    def drawn(self) -> str:
        """How the images were drawn, in short."""
        if self.facts.get("reconstruct") is not None:
            return "reconstruction"
        if self.facts.get("sampler") is None:
            return "one call"
        name = str(self.facts["sampler"].get("_target_", "")).rpartition(".")[2]
        weight = self.facts.get("guidance_weight")
        return f"{name} {self.facts.get('steps')}" + ("" if weight is None else f", w = {number(float(weight))}")


@dataclass
class Board:
    """Evaluations by setting, the best FID first.

    Attributes:
        groups: entries that may be compared.
        names: what to call the data of a digest.
        left_out: evaluations that are on no board, each with the reason.
    """

    groups: dict[Setting, list[Entry]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def title(self, setting: Setting) -> str:
        """A heading."""
        which = "all splits" if setting.split == "all" else f"split {setting.split}"
        size = " x ".join(map(str, setting.image_shape))
        name = self.names.get(setting.digest, "data")
        what = "images" if setting.reconstructed is None else f"reconstructions of {setting.reconstructed}"
        return f"{name}, {size}: {setting.n:,} {what} against {setting.n_real:,} real ones ({which})"


def collect(folder: Path) -> Board:
    """Reads every evaluation at or below a folder.

    Models of the same data under other names meet in one group: data are told apart by their content.
    """
    board = Board()
    for run in run_folders(folder):
        if not (run / "metrics.json").exists():
            continue
        try:
            facts, metrics = read_metrics(run)
        except AntherError as error:
            board.left_out.append(str(error))
            continue
        results = {split_key(key).name: result for key, result in metrics.items()}
        if (setting := _setting(facts, results)) is None:
            board.left_out.append(f"{run} has no FID, or does not say which real images it was held against.")
            continue
        board.names.setdefault(setting.digest, str(facts.get("data") or "data"))
        entry = Entry(str(facts.get("experiment") or "?"), os.path.relpath(run, folder), facts, results)
        board.groups.setdefault(setting, []).append(entry)
    for entries in board.groups.values():
        entries.sort(key=lambda entry: (entry.value("fid") or 0.0, entry.run))
    board.groups = dict(sorted(board.groups.items(), key=lambda item: (board.title(item[0]), item[0].weights)))
    return board


def _setting(facts: Mapping[str, Any], results: Mapping[str, Result]) -> Setting | None:
    fid = results.get("fid")
    needed = ("data_digest", "split", "N", "N_real", "image_shape", "weights_sha256")
    if fid is None or fid.value is None or any(fid.protocol.get(key) is None for key in needed):
        return None
    protocol = fid.protocol
    digest, split, n_real = protocol["data_digest"], protocol["split"], protocol["N_real"]
    return Setting(
        # Evaluations of before it was recorded stand together by what they have.
        reals=protocol.get("reals") or f"{digest} {split} {n_real}",
        digest=digest,
        split=split,
        n=protocol["N"],
        n_real=n_real,
        image_shape=tuple(protocol["image_shape"]),
        weights=protocol["weights_sha256"],
        originals=facts.get("originals_digest"),
        reconstructed=facts.get("reconstruct"),
    )


# For people -----------------------------------------------------------------------------------------------------------


def cells(entry: Entry) -> list[str]:
    """A row of the table: model, run, how it draws, and every metric with its deviation and verdict."""
    row = [entry.model, entry.run, entry.drawn]
    for metric in METRICS:
        result = entry.results.get(metric)
        if result is None or result.value is None:
            row.append("")
            continue
        spread = entry.value(SPREADS[metric]) if metric in SPREADS else None
        text = number(result.value) + ("" if spread is None else f" ± {number(spread)}")
        row.append(text + (f" {result.verdict.split(' ')[0]}" if result.verdict else ""))
    return row


HEADINGS = ["model", "run", "drawn by", *(TITLES[metric][0] for metric in METRICS)]


def legend() -> str:
    """What the words mean."""
    borders = [
        f"{TITLES[name][0]} {'below' if better == 'lower' else 'above'} {good:g} good, {excellent:g} excellent"
        for name, (better, good, excellent) in VERDICTS.items()
    ]
    return "; ".join(borders) + " (seed 004's words); diversity has no better direction"


def markdown(board: Board) -> str:
    """The board for a document."""
    parts = []
    for setting, entries in board.groups.items():
        lines = [HEADINGS, ["---"] * len(HEADINGS), *map(cells, entries)]
        table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        parts.append("\n".join([f"**{board.title(setting)}**", "", *table]))
    return "\n\n".join([*parts, legend() + "."])


def write_csv(board: Board, path: Path) -> None:
    """Writes all entries with all their digits.

    Raises:
        AntherError: the file cannot be written.
    """
    names = [name for metric in METRICS for name in (metric, SPREADS.get(metric)) if name]
    columns = ["data", "data_digest", "split", "N", "N_real", "model", "run", "drawn_by", *names]
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for setting, entries in board.groups.items():
            shared = [board.names[setting.digest], setting.digest, setting.split, setting.n, setting.n_real]
            for entry in entries:
                writer.writerow([*shared, entry.model, entry.run, entry.drawn, *(entry.value(name) for name in names)])


def draw(board: Board) -> "Figure":
    """Bars of every metric, a row of panels per setting, and below them what the lines are."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    sizes = [len(entries) for entries in board.groups.values()]
    heights = [0.9 + 0.34 * size + 0.4 for size in sizes]
    figure = Figure(figsize=(13, sum(heights) + 0.3), dpi=DPI, layout="constrained")
    *rows, below = figure.subfigures(len(sizes) + 1, 1, height_ratios=[*heights, 0.3], squeeze=False)[:, 0]
    lines = [
        Line2D([], [], color=ORANGE, lw=1, ls="--", label="good (seed 004's words)"),
        Line2D([], [], color=ORANGE, lw=1, ls=":", label="excellent"),
        Line2D([], [], color=GREY, lw=1.5, label="± deviation"),
        Line2D([], [], ls="", label="↓ lower is better, ↑ higher is better"),
    ]
    below.legend(handles=lines, loc="center", ncols=len(lines), fontsize=8)
    for row, (setting, entries) in zip(rows, board.groups.items(), strict=True):
        row.suptitle(board.title(setting), x=0.01, ha="left", fontsize=10, weight="bold")
        for axes, metric in zip(row.subplots(1, len(METRICS), sharey=True), METRICS, strict=True):
            _bars(axes, metric, entries)
    return figure


def _bars(axes: "Axes", metric: str, entries: Sequence[Entry]) -> None:
    places = range(len(entries))
    values = [entry.value(metric) for entry in entries]
    spreads = [(entry.value(SPREADS[metric]) or 0.0) if metric in SPREADS else 0.0 for entry in entries]
    axes.barh(places, [v or 0.0 for v in values], xerr=spreads, height=0.65, color=BLUE, alpha=0.85, ecolor=GREY)
    names = [f"{entry.model} ({entry.drawn})" for entry in entries]
    names = [
        name if names.count(name) == 1 else f"{name}, {entry.run}" for name, entry in zip(names, entries, strict=True)
    ]
    axes.set_yticks(places, names, fontsize=7)
    axes.grid(False, axis="y")
    for place, (value, spread) in enumerate(zip(values, spreads, strict=True)):
        said = "none" if value is None else number(value)
        end = max((value or 0.0) + spread, 0.0)
        axes.annotate(said, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.margins(x=0.25)
    arrow = ""
    if metric in VERDICTS:
        better, good, excellent = VERDICTS[metric]
        arrow = " ↓" if better == "lower" else " ↑"
        for border, style in ((good, "--"), (excellent, ":")):
            axes.axvline(border, color=ORANGE, lw=1, ls=style)
    axes.set_title(TITLES[metric][0] + arrow, fontsize=9)
    if not axes.yaxis_inverted():  # the panels share it
        axes.invert_yaxis()


def _print(board: Board) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no edge
    for setting, entries in board.groups.items():
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), title=board.title(setting))
        table.title_justify = "left"
        for heading in HEADINGS:
            table.add_column(heading, overflow="fold")
        for entry in entries:
            table.add_row(*[Text(cell) for cell in cells(entry)])
        console.print(table)
        console.print()
    console.print(legend(), style="dim", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
        AntherError: there are no evaluations with an FID.
    """
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m diffusion.evaluation.scoreboard", description=summary)
    parser.add_argument("folder", nargs="?", default="runs", type=Path, help="where the runs are (runs)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the bars there, as PNG")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there too, with all digits")
    parser.add_argument("--markdown", action="store_true", help="print it for a document")
    chosen = parser.parse_args(arguments)
    board = collect(chosen.folder)
    if not board.groups:
        reasons = "".join(f" {line}" for line in board.left_out[:3])
        raise AntherError(
            f"there is no evaluation with an FID below {chosen.folder}: run evaluate.py, or name the folder where they "
            f"are.{reasons}"
        )
    if chosen.markdown:
        print(markdown(board))
    else:
        _print(board)
    for line in board.left_out:
        print(f"left out: {line}")
    if chosen.csv is not None:
        write_csv(board, chosen.csv)
        print(f"table        {chosen.csv}")
    if chosen.picture is not None:
        with styled():
            save(draw(board), chosen.picture)
        print(f"picture      {chosen.picture}")


if __name__ == "__main__":
    cli.run(main)
