"""The losses of a run as a picture, from its own log."""

import csv
from pathlib import Path

from diffusion.files import atomic

CURVES = {
    "train/loss_step": "training, single batches",
    "train/loss_epoch": "training, epochs",
    "val/loss": "validation",
}


def draw_losses(log: Path, path: Path) -> None:
    """Draws every loss that the log holds over optimizer steps.

    Args:
        log: a `metrics.csv` of `loggers.CSVLog`.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in CURVES.items():
        points = [(int(row["step"]) + 1, float(row[name])) for row in rows if row.get(name)]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, alpha=0.3 if name == "train/loss_step" else 1.0)
    axes.set(xlabel="optimizer steps", ylabel="loss", yscale="log")
    axes.legend()
    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))  # type: ignore[no-untyped-call]
