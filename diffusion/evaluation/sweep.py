"""The end of a sweep of evaluations: one table, one picture, and the best setting."""

import atexit
import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.errors import HydraException
from hydra.experimental.callback import Callback

from diffusion.errors import AntherError
from diffusion.evaluation.metric import Result
from diffusion.evaluation.plots import BLUE, DPI, GREY, MARKERS, number, save, styled
from diffusion.evaluation.report import Key, read_metrics, split_key
from diffusion.evaluation.results import natural, run_folders
from diffusion.files import atomic
from diffusion.sweeps import ASKED, failure, is_of_other_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from omegaconf import DictConfig

WEIGHT = "guidance.weight"
CLIP, KID, FID = "clip_score_100", "kid", "fid"
TITLES = {CLIP: "CLIP score × 100", KID: "KID", FID: "FID"}


@dataclass(frozen=True)
class Job:
    """One evaluation of a sweep.

    Attributes:
        folder: of the run.
        overrides: what it was asked for, value by key.
        results: None where it left no metrics.
        missing: why there are none.
    """

    folder: Path
    overrides: Mapping[str, str]
    results: Mapping[str, Result] | None = None
    missing: str = ""

    def of(self, name: str) -> tuple[Key, Result] | None:
        """The metric of that name, whatever its N and scorer."""
        for key, result in (self.results or {}).items():
            part = split_key(key)
            if part.name == name:
                return part, result
        return None

    def value(self, name: str) -> float | None:
        """Its number, if there is one."""
        found = self.of(name)
        return found[1].value if found else None


@dataclass(frozen=True)
class Sweep:
    """The evaluations of a sweep, in the order of their settings.

    Attributes:
        jobs: those with metrics.
        failed: those without.
        keys: the overrides that are not the same in all jobs.
    """

    jobs: Sequence[Job]
    failed: Sequence[Job] = ()
    keys: Sequence[str] = ()

    def label(self, job: Job) -> str:
        """The settings that make this job another."""
        return ", ".join(f"{_short(key)} = {job.overrides[key]}" for key in self.keys if key in job.overrides)


class SweepReport(Callback):
    """At the end of a sweep writes `sweep.csv` and `sweep.png` into its folder, and prints the table and the best w.

    Hydra tells nobody of the end when a job failed or the sweep was broken off; then the report comes when the process
    ends. A sweep without a finished evaluation gets none.
    """

    def __init__(self) -> None:
        self._report: Callable[[], None] | None = None

    def on_multirun_start(self, config: "DictConfig", **kwargs: Any) -> None:  # noqa: D102
        folder, planned = Path(config.hydra.sweep.dir).absolute(), _planned(config)
        self._report = partial(self.report, folder, planned)
        atexit.register(self._report)

    def on_multirun_end(self, config: "DictConfig", **kwargs: Any) -> None:  # noqa: D102
        if self._report is None:
            self.on_multirun_start(config)
        assert self._report is not None
        atexit.unregister(self._report)
        self._report()

    def report(self, folder: Path, planned: Sequence[Sequence[str]]) -> None:
        """Reports the sweep in a folder; sweeps of other commands do it in their own way."""
        report(folder, planned)


def report(folder: Path, planned: Sequence[Sequence[str]] = ()) -> None:
    """Reports the sweep in a folder; see `SweepReport`.

    Args:
        folder: of the sweep, above its jobs.
        planned: the overrides of each job that was to run, where they are known.
    """
    sweep = read_sweep(folder, planned)
    if not sweep.jobs:
        return
    write_csv(sweep, folder / "sweep.csv")
    drawn = draw_sweep(sweep, folder / "sweep.png")
    _print(sweep)
    print(f"table        {folder / 'sweep.csv'}")
    if drawn:
        print(f"picture      {folder / 'sweep.png'}")


def evaluated(run: Path) -> Mapping[str, Result]:
    """The metrics of an evaluation.

    Raises:
        AntherError: there are none; its message says why.
    """
    try:
        return read_metrics(run)[1]
    except AntherError as error:
        there = (run / "metrics.json").exists()
        raise AntherError("metrics.json is damaged" if there else "not finished") from error


def read_sweep(
    folder: Path,
    planned: Sequence[Sequence[str]] = (),
    read: Callable[[Path], Mapping[str, Result]] = evaluated,
) -> Sweep:
    """The jobs below a folder, sorted by the settings that differ, numbers as numbers.

    What lies in the folder of a job that failed or was broken off may be of other settings than those that it was asked
    for last, and is left out.

    Args:
        folder: of the sweep.
        planned: the overrides of each job that was to run, where they are known.
        read: a job's folder -> its results.
    """
    jobs = []
    for run in run_folders(folder):
        try:
            overrides = _overrides(yaml.safe_load((run / ASKED).read_text("utf-8")) or [])
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
            jobs.append(Job(run, {}, None, "its .hydra/overrides.yaml is damaged"))
            continue
        try:
            if (why := failure(run)) is not None:
                raise AntherError(why)
            results = read(run)
            if is_of_other_settings(run):
                raise AntherError("not finished, and what was there before is of other settings")
            jobs.append(Job(run, overrides, results))
        except AntherError as error:
            jobs.append(Job(run, overrides, None, str(error)))
    ran = [job.overrides for job in jobs]
    jobs += [Job(folder, _overrides(p), None, "never begun") for p in planned if _overrides(p) not in ran]
    known = [job.overrides for job in jobs if job.overrides]
    names = dict.fromkeys(key for overrides in known for key in overrides)
    keys = [key for key in names if len({overrides.get(key) for overrides in known}) > 1]
    if not keys and WEIGHT in names:
        keys = [WEIGHT]
    jobs.sort(key=lambda job: [natural(job.overrides.get(key, "")) for key in keys])
    return Sweep([job for job in jobs if job.results is not None], [job for job in jobs if job.results is None], keys)


def best(sweep: Sweep, name: str) -> tuple[Job, Job | None]:
    """The best job by a metric, and the next one.

    Raises:
        AntherError: the metric is missing everywhere, or does not compare, since N or the scorers differ.
    """
    found = [(job, *pair) for job in sweep.jobs if (pair := job.of(name)) is not None and pair[1].value is not None]
    if not found:
        raise AntherError(f"{TITLES.get(name, name)} was not computed.")
    kinds = {(part.n, part.scorer) for _, part, _ in found}
    if len(kinds) > 1:
        raise AntherError(f"{TITLES.get(name, name)} does not compare over different N or scorers.")
    sign = -1 if found[0][2].better == "higher" else 1
    order = sorted((job for job, _, _ in found), key=lambda job: sign * (job.value(name) or 0.0))
    return order[0], order[1] if len(order) > 1 else None


# The picture ----------------------------------------------------------------------------------------------------------


def draw_sweep(sweep: Sweep, path: Path) -> bool:
    """Draws CLIP score against KID and against FID, a line over the guidance weight.

    Without a CLIP score, or without KID and FID, the metrics are drawn over the guidance weight alone.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    axis = WEIGHT if WEIGHT in sweep.keys else next(iter(sweep.keys), WEIGHT)
    there = [name for name in (KID, FID, CLIP) if any(job.value(name) is not None for job in sweep.jobs)]
    pairs = [(name, CLIP) for name in (KID, FID) if {name, CLIP} <= set(there)] or [(axis, name) for name in there]
    if not pairs:
        path.unlink(missing_ok=True)
        return False
    with styled():
        figure = Figure(figsize=(5.2 * len(pairs), 4.2), dpi=DPI, layout="constrained")
        for k, ((x, y), axes) in enumerate(zip(pairs, figure.subplots(1, len(pairs), squeeze=False).flat, strict=True)):
            _panel(axes, sweep, x, y, axis, legend=k == len(pairs) - 1)
        save(figure, path)
    return True


def _panel(axes: "Axes", sweep: Sweep, x: str, y: str, axis: str, legend: bool) -> None:
    others = [key for key in sweep.keys if key != axis]
    lines: dict[str, list[tuple[float, float, str, float]]] = {}
    for job in sweep.jobs:
        across = _float(job.overrides.get(axis)) if x == axis else job.value(x)
        up, setting = job.value(y), job.overrides.get(axis, "")
        if across is None or up is None:
            continue
        name = ", ".join(f"{_short(key)} = {job.overrides.get(key, 'default')}" for key in others)
        deviation = (job.value(f"{x}_std") if x == KID else None) or 0.0
        lines.setdefault(name, []).append((across, up, setting, deviation))
    colours = [BLUE, *(f"C{k}" for k in range(1, 10))]
    for k, (name, points) in enumerate(lines.items()):
        colour = colours[k % len(colours)]
        xs, ys, settings, deviations = zip(*points, strict=True)
        if all(_float(setting) is not None for setting in settings):
            axes.plot(xs, ys, color=colour, lw=1, alpha=0.5)
        axes.errorbar(
            xs,
            ys,
            xerr=deviations if any(deviations) else None,
            fmt=MARKERS[k // len(colours) % len(MARKERS)],
            ms=6,
            color=colour,
            ecolor=GREY,
            elinewidth=0.8,
            label=name,
        )
        for across, up, setting, _ in points:
            text = setting if x == axis else f"{_short(axis)} = {setting}"
            axes.annotate(text, (across, up), (5, 5), textcoords="offset points", fontsize=8)
    axes.margins(0.14)
    what = f"{TITLES[y]} against {TITLES[x]}" if x in TITLES else f"{TITLES[y]} over {_short(x)}"
    axes.set_title(what)
    arrows = {CLIP: " (higher is better)", KID: " (lower is better)", FID: " (lower is better)"}
    bars = ", with its deviation over subsets" if x == KID else ""
    across_is = TITLES.get(x, _short(x)) + arrows.get(x, "") + bars
    axes.set(xlabel=across_is, ylabel=TITLES[y] + arrows[y] + _scorer(sweep, y))
    if legend and others:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)


def _scorer(sweep: Sweep, name: str) -> str:
    scorers = dict.fromkeys(pair[0].scorer for job in sweep.jobs if (pair := job.of(name)) and pair[0].scorer)
    return f"\nby {' or '.join(map(str, scorers))}" if scorers else ""


# The table ------------------------------------------------------------------------------------------------------------


def write_csv(sweep: Sweep, path: Path) -> None:
    """Writes a row per job: its settings, its folder, why it is missing, and its results with all digits."""
    metrics = list(dict.fromkeys(key for job in sweep.jobs for key in job.results or {}))
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*sweep.keys, "folder", "missing", *metrics])
        for job in [*sweep.jobs, *sweep.failed]:
            found = job.results or {}
            values = [found[key].value if key in found else None for key in metrics]
            settings = [job.overrides.get(key) for key in sweep.keys]
            writer.writerow([*settings, os.path.relpath(job.folder, path.parent), job.missing, *values])


def _print(sweep: Sweep) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = [CLIP, FID, KID, "precision", "recall", "diversity", "nearest_distance"]
    names = [name for name in names if any(job.value(name) is not None for job in sweep.jobs)]
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for key in sweep.keys:
        table.add_column(Text(key), justify="right")
    for name in names:
        table.add_column(TITLES.get(name, name.replace("_", " ")), justify="right")
    for job in sweep.jobs:
        cells = [job.overrides.get(key, "") for key in sweep.keys]
        for name in names:
            value, spread = job.value(name), job.value(f"{name}_std") if name == KID else None
            cells.append("" if value is None else number(value) + (f" ± {number(spread)}" if spread else ""))
        table.add_row(*map(Text, cells))
    console = Console()
    console.print(table)
    for line in [*missing(sweep), *choices(sweep)]:
        console.print(Text(line), soft_wrap=True)


def missing(sweep: Sweep) -> list[str]:
    """A line for each job without results."""
    return [f"missing: {sweep.label(job) or job.folder}: {job.missing} ({job.folder})" for job in sweep.failed]


def choices(sweep: Sweep) -> list[str]:
    """Which setting is best by KID (else FID) and by CLIP, and how much that says."""
    lines = []
    first = next((name for name in (KID, FID) if any(job.value(name) is not None for job in sweep.jobs)), None)
    for name in filter(None, (first, CLIP)):
        try:
            winner, second = best(sweep, name)
        except AntherError as error:
            lines.append(f"no best by {TITLES[name]}: {error}")
            continue
        part, result = winner.of(name) or (Key(name), Result(None))
        assert result.value is not None
        by = f" by {part.scorer}" if part.scorer else ""
        line = f"best {TITLES[name]}{by}: {sweep.label(winner) or winner.folder.name} with {number(result.value)}"
        gap = abs((second.value(name) or 0.0) - result.value) if second else None
        if second and gap is not None:
            line += f"; next {sweep.label(second) or second.folder.name}, {number(gap)} away"
            spread = winner.value(f"{name}_std") if name == KID else None
            if spread is not None and gap < spread:
                line += f", less than the deviation {number(spread)} over its subsets"
        lines.append(line)
    numbers = sorted({n for job in sweep.jobs for key in job.results or {} if (n := split_key(key).n) is not None})
    if numbers and len(sweep.jobs) > 1:
        lines.append(
            f"Chosen on N = {' or '.join(map(str, numbers))} images per setting, the same that are reported: small "
            "differences may be chance, and the best one's numbers flatter it. Evaluate it again with a seed that is "
            f"{max(numbers)} away or more: image k is drawn from seed + k."
        )
    seeds = sorted({int(seed) for job in sweep.jobs if (seed := job.overrides.get("seed", "")).isdigit()})
    if numbers and any(later - seed < max(numbers) for seed, later in pairwise(seeds)):
        lines.append(
            f"Image k is drawn from seed + k, so jobs whose seeds are less than {max(numbers)} apart drew images from "
            "the same noise: how far their numbers spread says little."
        )
    return lines


# Overrides ------------------------------------------------------------------------------------------------------------


def _overrides(lines: Sequence[str]) -> dict[str, str]:
    pairs = (line.partition("=") for line in lines)
    return {key.lstrip("+"): value for key, _, value in pairs}


def _planned(config: "DictConfig") -> list[list[str]]:
    """The jobs of Hydra's own grid sweeper; other sweepers decide as they go."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not str(config.hydra.sweeper._target_).endswith(".BasicSweeper"):
        return []
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    try:
        parsed = OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task])
        return BasicSweeper.split_arguments(parsed, None)[0]
    except HydraException:  # choice(*) of a group needs the config's search path
        return []


def _float(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _short(key: str) -> str:
    return "w" if key == WEIGHT else key
