"""An evaluation in the experiment tracker, from the files of its folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger

from diffusion.evaluation.metric import Result
from diffusion.evaluation.plots import by_prompt
from diffusion.evaluation.report import read_metrics, split_key
from diffusion.loggers import CSVLog, log_picture, log_table

if TYPE_CHECKING:
    import pandas as pd

COLUMNS: Mapping[str, str] = {
    "CLIP Score": "clip_score",
    "Uniqueness": "uniqueness",
    "Representativeness": "representativeness",
}
TABLE, CHARTS = "evaluation_results_table", ("clip_scores_chart", "uniqueness_chart", "representativeness_chart")


def track(folder: Path, loggers: Sequence[Logger], max_rows: int = 1000) -> None:
    """Gives the trackers what the folder's record says; nothing is typed anew.

    The config is the record's `run`; the metrics carry the keys of `metrics.json`; every picture in `plots/` is shown.
    W&B also gets the table of images, prompts and scores, a chart of each of its three scores (means per prompt, or
    a histogram without prompts) and the summary. "Representativeness" is the field of that name, FiftyOne Brain's,
    which is 1 for the image farthest from its cluster's centre; the most representative prompt is that of the highest
    `representativeness_closeness`. Deviations are the images' own (ddof 0).

    The run stays open: `diffusion.loggers.finish` closes it. A CSV log gets nothing, since the folder holds it all.

    Args:
        folder: of the evaluation, with `metrics.json`, `records.parquet` and `plots/`.
        loggers: of the config.
        max_rows: of the table, the first ones by id.

    Raises:
        AntherError: a file of the folder is missing or damaged.
    """
    trackers = [logger for logger in loggers if not isinstance(logger, CSVLog)]
    if not trackers:
        return
    from diffusion.curation.records import read

    run, results = read_metrics(folder)
    frame = read(folder)
    values = {key: result.value for key, result in results.items() if result.value is not None}
    for tracker in trackers:
        tracker.log_hyperparams(run)
        tracker.log_metrics(values, step=0)
    for path in sorted((folder / "plots").glob("*.png")):
        log_picture(trackers, f"plots/{path.stem}", path, 0)
    boards: list[Any] = [logger for logger in trackers if type(logger).__name__ == "WandbLogger"]
    if boards:
        log_table(boards, TABLE, ["Image", "Prompt", *COLUMNS], _rows(folder, frame.head(max_rows)), 0)
    for board in boards:
        board.experiment.log(_charts(frame))
        board.experiment.summary.update(_summary(frame, results))


def _rows(folder: Path, frame: "pd.DataFrame") -> list[list[Any]]:
    from PIL import Image

    rows = []
    for record in frame.to_dict("records"):
        with Image.open(folder / record["file"]) as image:
            picture = image.convert("RGB")
        scores = [record.get(name) for name in COLUMNS.values()]
        # NaN is what a table reads for a score that one image does not have.
        rows.append([picture, record["prompt"], *[None if score != score else score for score in scores]])
    return rows


def _charts(frame: "pd.DataFrame") -> dict[str, Any]:
    import wandb

    charts = {}
    for chart, (title, name) in zip(CHARTS, COLUMNS.items(), strict=True):
        if name not in frame or not frame[name].notna().any():
            continue
        if frame["prompt"].notna().any():
            bars = by_prompt(frame, name)["mean"]
            table = wandb.Table(columns=["Prompt", title], data=[[str(p), float(mean)] for p, mean in bars.items()])
            charts[chart] = wandb.plot.bar(table, "Prompt", title, title=f"{title}, mean of each prompt")
        else:
            table = wandb.Table(columns=[title], data=[[float(value)] for value in frame[name].dropna()])
            charts[chart] = wandb.plot.histogram(table, title, title=title)
    return charts


def _summary(frame: "pd.DataFrame", results: Mapping[str, Result]) -> dict[str, Any]:
    """What seed 000 kept of an evaluation, as far as it was computed."""
    summary: dict[str, Any] = {"total_images_generated": len(frame)}
    for key, result in results.items():
        if split_key(key).name == "fid" and result.value is not None:
            summary["fid_score"] = result.value
    names = [*COLUMNS.values(), "representativeness_closeness"]
    scores = {name: frame[name].dropna() for name in names if name in frame and frame[name].notna().any()}
    summary |= {f"mean_{name}": float(values.mean()) for name, values in scores.items()}
    if "clip_score" in scores:
        clip = scores["clip_score"]
        summary |= {
            "best_clip_score": float(clip.max()),
            "std_clip_score": float(clip.std(ddof=0)),
            "min_clip_score": float(clip.min()),
            "max_clip_score": float(clip.max()),
        }
    for said, name in {
        "best_clip_prompt": "clip_score",
        "most_unique_prompt": "uniqueness",
        "most_representative_prompt": "representativeness_closeness",
    }.items():
        if name in scores and (prompt := frame["prompt"][scores[name].idxmax()]) is not None:
            summary[said] = prompt
    return summary
