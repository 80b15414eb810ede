"""The end of a sweep of trainings: one table, one picture, and the best setting."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffusion.cli import RESULT, SECONDS
from diffusion.errors import AntherError
from diffusion.evaluation.metric import Result
from diffusion.evaluation.plots import BLUE, DPI, number, save, styled
from diffusion.evaluation.sweep import Job, Sweep, SweepReport, missing, read_sweep, write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = ("val/loss", "train/loss_epoch", "train/loss_step")
"""Losses that are drawn: of each job the first that its log has."""


class TrainingSweepReport(SweepReport):
    """`SweepReport` for train.py: the objective and the seconds of every job, and the losses of all of them."""

    def report(self, folder: Path, planned: Sequence[Sequence[str]]) -> None:  # noqa: D102
        report(folder, planned)


def report(folder: Path, planned: Sequence[Sequence[str]] = ()) -> None:
    """Writes `sweep.csv` and `sweep.png` into the folder of a sweep, and prints the table and the best job.

    Args:
        folder: of the sweep, above its jobs.
        planned: the overrides of each job that was to run, where they are known.
    """
    sweep = read_sweep(folder, planned, trained)
    if not sweep.jobs:
        return
    write_csv(sweep, folder / "sweep.csv")
    draw(sweep, folder / "sweep.png")
    _print(sweep)
    print(f"table        {folder / 'sweep.csv'}")
    print(f"picture      {folder / 'sweep.png'}")


def trained(run: Path) -> Mapping[str, Result]:
    """The objective of a finished training, under its name, and the seconds that it took.

    Raises:
        AntherError: it is not finished, or its record is damaged.
    """
    try:
        record = json.loads((run / RESULT).read_text("utf-8"))
        name, value = str(record["metric"]), record["objective"]  # null where the run did not validate
        found = {name: Result(None if value is None else float(value), _better(name))}
        seconds = record.get(SECONDS)  # runs of older versions did not say
        return found | {SECONDS: Result(None if seconds is None else float(seconds))}
    except FileNotFoundError as error:
        raise AntherError("failed or not finished") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AntherError(f"{RESULT} is damaged") from error


def _better(metric: str) -> Literal["higher", "lower"] | None:
    name = metric.rpartition("/")[2]
    if "loss" in name:
        return "lower"
    return "higher" if name.startswith(("clip_score", "accuracy")) else None


def _objective(job: Job) -> tuple[str, Result]:
    return next((name, result) for name, result in (job.results or {}).items() if name != SECONDS)


def choice(sweep: Sweep) -> str:
    """Which job is best and how far the next one is; empty where nobody knows which direction is better.

    Objectives of different losses or targets do not compare, and neither do those of different metrics.
    """
    named = [(job, *_objective(job)) for job in sweep.jobs]
    if len({name for _, name, _ in named}) > 1:
        return "no best: the jobs have different objectives."
    (_, name, first), *_ = named
    if first.better == "lower" and (changed := [key for key in sweep.keys if _changes_the_loss(key)]):
        return (
            f"no best: {name} does not compare where {', '.join(changed)} differs, for it is another measure in each "
            "job: evaluate the runs."
        )
    if first.better is None:
        return ""
    sign = -1 if first.better == "higher" else 1
    # Of what is no number nothing is best.
    order = sorted(
        (sign * r.value, k) for k, (_, _, r) in enumerate(named) if r.value is not None and r.value == r.value
    )
    if not order:
        return ""
    value, k = order[0]
    line = f"best {name}: {sweep.label(named[k][0]) or named[k][0].folder.name} with {number(sign * value)}"
    if len(order) > 1:
        other = named[order[1][1]][0]
        line += f"; next {sweep.label(other) or other.folder.name}, {number(order[1][0] - value)} away"
    return f"{line}. One seed each: repeat the best with others before you believe a small difference."


def _changes_the_loss(key: str) -> bool:
    """Whether two models that are equally good have different losses under two values of a setting."""
    measures = ("target", "loss", "weighting", "schedule", "T", "module.loss", "module.kl_weight")
    images = ("data", "data.path", "data.size", "data.drawing_seed")
    return key in images or any(key == part or key.startswith(f"{part}.") for part in measures)


def _print(sweep: Sweep) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(name for job in sweep.jobs for name in job.results or {} if name != SECONDS))
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ["job", *sweep.keys, *names, SECONDS]:
        table.add_column(Text(title), justify="right")
    for job in sweep.jobs:
        values = [(job.results or {}).get(name) for name in [*names, SECONDS]]
        numbers = ["" if value is None or value.value is None else number(value.value) for value in values]
        table.add_row(*map(Text, [job.folder.name, *(job.overrides.get(key, "") for key in sweep.keys), *numbers]))
    console = Console()
    console.print(table)
    for line in [*missing(sweep), choice(sweep)]:
        if line:
            console.print(Text(line), soft_wrap=True)


# The picture ----------------------------------------------------------------------------------------------------------


def draw(sweep: Sweep, path: Path) -> None:
    """Draws the objective over the settings, and beside it the loss of every job over its steps."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(11, 4.2), dpi=DPI, layout="constrained")
        left, right = figure.subplots(1, 2)
        _objectives(left, sweep)
        _losses(right, sweep)
        save(figure, path)


def _objectives(axes: "Axes", sweep: Sweep) -> None:
    names = [_objective(job)[0] for job in sweep.jobs]
    values = [math.nan if (value := _objective(job)[1].value) is None else value for job in sweep.jobs]
    places = [_setting(sweep, job) for job in sweep.jobs]
    if len(sweep.keys) == 1 and all(isinstance(place, float) for place in places):
        numbers = [place for place in places if isinstance(place, float)]
        axes.plot(numbers, values, "o-", color=BLUE)
        axes.set_xlabel(sweep.keys[0])
        # Grids of rates and sizes are steps of a factor.
        if min(numbers) > 0 and max(numbers) >= 5 * min(numbers):
            axes.set_xscale("log")
        axes.set_xticks(numbers, [sweep.jobs[k].overrides[sweep.keys[0]] for k in range(len(numbers))])
        axes.minorticks_off()
    else:
        axes.plot(range(len(values)), values, "o", color=BLUE)
        axes.set_xticks(range(len(values)), [_label(sweep, job) for job in sweep.jobs], rotation=30, ha="right")
    axes.set(title="at the end", ylabel=" or ".join(dict.fromkeys(names)))


def _losses(axes: "Axes", sweep: Sweep) -> None:
    drawn: list[str] = []
    for k, job in enumerate(sweep.jobs):
        name, points = _curve(job.folder / "logs" / "metrics.csv")
        if points:
            drawn.append(name)
            axes.plot(*zip(*points, strict=True), color=f"C{k % 10}", label=_label(sweep, job), lw=1.2)
    axes.set(title="as training goes on", xlabel="optimizer steps", ylabel=" or ".join(dict.fromkeys(drawn)))
    if drawn:
        axes.set_yscale("log")
        axes.legend(fontsize=8)


def _curve(log: Path) -> tuple[str, list[tuple[int, float]]]:
    """The first loss that a run logged, over steps; empty where its log is missing or damaged."""
    try:
        with log.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for name in CURVES:
            if points := [(int(row["step"]) + 1, float(row[name])) for row in rows if row.get(name)]:
                return name, points
    except (OSError, ValueError, KeyError, csv.Error):
        pass
    return "", []


def _setting(sweep: Sweep, job: Job) -> float | str:
    text = job.overrides.get(sweep.keys[0], "") if sweep.keys else ""
    try:
        return float(text)
    except ValueError:
        return text


def _label(sweep: Sweep, job: Job) -> str:
    return sweep.label(job) or job.folder.name
