"""One table over all runs, from what the runs recorded.

python -m diffusion.evaluation.results [RUNS_FOLDER] [--csv FILE] [--markdown]
"""

import argparse
import csv
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffusion import cli
from diffusion.errors import AntherError
from diffusion.evaluation.plots import number
from diffusion.evaluation.report import read_metrics, split_key
from diffusion.files import atomic, sha256

COLUMNS: Mapping[str, str] = {
    "experiment": "experiment",
    "run": "run",
    "val_loss_best": "val loss: best",
    "val_loss_last": "last",
    "val_loss_evaluated": "evaluated",
    "guidance_weight": "w",
    "num_images": "N",
    "clip_score_100": "CLIP × 100",
    "clip_model": "by",
    "fid": "FID",
    "kid": "KID",
    "classifier_confidence_percent": "confidence %",
    "parameters": "parameters",
    "epoch_seconds": "s / epoch",
    "peak_gpu_mem_mb": "GPU MiB",
    "note": "note",
}
LEGEND = (
    "val loss: best and last of the training, and that of the evaluated checkpoint where it is known; s / epoch: the "
    "median; GPU MiB: the peak"
)
METRICS = {"clip_score_100": 1.0, "fid": 1.0, "kid": 1.0, "classifier_confidence": 100.0}
# No runs lie in these, and walking them takes long.
CONTENTS = {"images", "dataset", "imagefolder", "checkpoints", "samples", "logs", "plots", ".hydra"}


@dataclass
class Results:
    """All runs below a folder.

    Attributes:
        rows: one per evaluation, and one per training without any; values by the names of `COLUMNS`, where known.
        damaged: records that could not be read, and were left out.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def run_folders(folder: Path) -> Iterator[Path]:
    """Every folder of a run at or below a folder, in order of their names, numbers as numbers."""
    for path, folders, files in os.walk(folder):
        if ".hydra" in folders or "metrics.json" in files:
            yield Path(path)
        folders[:] = sorted(set(folders) - CONTENTS, key=natural)


def natural(text: str) -> tuple[int, float, str]:
    """Sorts numbers as numbers, before other texts."""
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def collect(folder: Path) -> Results:
    """Reads the records of every run below a folder; an evaluation joins the training that made its checkpoint.

    An evaluation belongs to the training in whose folder its checkpoint lies, or, where that has moved, to the one that
    holds a checkpoint of the same hash.
    """
    results = Results()
    trainings: dict[Path, dict[str, Any]] = {}
    evaluations: list[tuple[Path, dict[str, Any], dict[str, Any]]] = []
    for run in run_folders(folder):
        if (run / "metrics.json").exists():
            try:
                facts, values = _evaluation(run)
            except AntherError as error:
                results.damaged.append(str(error))
                continue
            evaluations.append((run, facts, values))
        elif (row := _training(run, results.damaged)) is not None:
            trainings[run] = row
    hashes: dict[Path, str] = {}
    evaluated = set()
    for run, facts, values in evaluations:
        home = _home(facts, trainings, hashes)
        row = trainings[home] if home is not None else {}
        evaluated.add(home)
        notes = [row.get("note", ""), _changed(facts, run) if home is not None else "no training record"]
        note = "; ".join(filter(None, notes))
        results.rows.append({**row, **values, "run": os.path.relpath(run, folder), "note": note})
    for run, row in trainings.items():
        if run not in evaluated:
            results.rows.append({**row, "run": os.path.relpath(run, folder)})
    results.rows.sort(key=lambda row: (str(row.get("experiment") or ""), [natural(p) for p in Path(row["run"]).parts]))
    return results


def _training(run: Path, damaged: list[str]) -> dict[str, Any] | None:
    """What a run of train.py recorded; None for another command's run, or where not even the config can be read."""
    log, record = run / "logs" / "metrics.csv", run / cli.RESULT
    if not (log.exists() or record.exists()):
        return None
    try:
        config = yaml.safe_load((run / ".hydra" / "config.yaml").read_text("utf-8"))
        row: dict[str, Any] = {"experiment": config["name"]}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        damaged.append(f"{run / '.hydra' / 'config.yaml'} is damaged.")
        return None
    if log.exists():
        try:
            row |= _logged(log)
        except (OSError, ValueError, csv.Error):
            damaged.append(f"{log} is damaged.")
    if not record.exists():
        row["note"] = "unfinished"
        return row
    try:
        result = json.loads(record.read_text("utf-8"))
        if result["metric"] == "val/loss" and result["objective"] is not None:
            row.setdefault("val_loss_last", float(result["objective"]))
        if "parameters" in result:
            row["parameters"] = int(result["parameters"])
    except (OSError, ValueError, KeyError, TypeError):
        damaged.append(f"{record} is damaged.")
    return row


def _logged(log: Path) -> dict[str, Any]:
    """What the callbacks RunRecord and Throughput logged."""
    with log.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, strict=True))
    if not rows or "step" not in rows[0]:
        raise ValueError(log)
    columns = {name: [float(row[name]) for row in rows if row.get(name)] for name in rows[0] if name is not None}
    found: dict[str, Any] = {}
    if losses := columns.get("val/loss"):
        found["val_loss_last"] = losses[-1]
        # A loss that is no number is never the best one.
        found["val_loss_best"] = min((loss for loss in losses if math.isfinite(loss)), default=None)
    if seconds := columns.get("epoch_seconds"):
        found["epoch_seconds"] = statistics.median(seconds)
    if memory := columns.get("peak_gpu_mem_mb"):
        found["peak_gpu_mem_mb"] = max(memory)
    if parameters := columns.get("parameters"):
        found["parameters"] = int(parameters[-1])
    return found


def _evaluation(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The facts of an evaluation's generation, and its columns."""
    facts, metrics = read_metrics(run)
    row = {name: facts.get(name) for name in ("experiment", "guidance_weight", "num_images", "parameters")}
    row["val_loss_evaluated"] = facts.get("validation_loss")
    for key, metric in metrics.items():
        part = split_key(key)
        if part.name in METRICS and metric.value is not None:
            name = "classifier_confidence_percent" if part.name == "classifier_confidence" else part.name
            row[name] = METRICS[part.name] * metric.value
            if part.name == "clip_score_100":
                row["clip_model"] = part.scorer
    return facts, {name: value for name, value in row.items() if value is not None}


def _home(facts: Mapping[str, Any], trainings: Mapping[Path, Any], hashes: dict[Path, str]) -> Path | None:
    """The training that made an evaluation's checkpoint."""
    checkpoint = Path(str(facts.get("checkpoint"))).resolve()
    inside = [run for run in trainings if checkpoint.is_relative_to(run.resolve())]
    if inside:
        return max(inside, key=lambda run: len(run.resolve().parts))
    for run in trainings:
        for path in sorted((run / "checkpoints").glob("*.ckpt")):
            if path not in hashes:
                hashes[path] = sha256(path)
            if hashes[path] == facts.get("checkpoint_sha256"):
                return run
    return None


def _changed(facts: Mapping[str, Any], run: Path) -> str:
    checkpoint = Path(str(facts.get("checkpoint")))
    if checkpoint.exists() and checkpoint.stat().st_mtime > (run / "metrics.json").stat().st_mtime:
        return "its checkpoint was written anew since"
    return ""


# For people -----------------------------------------------------------------------------------------------------------


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the rows with all their digits.

    Raises:
        AntherError: the file cannot be written.
    """
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(COLUMNS), restval="")
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *([_cell(row, name) for name in COLUMNS] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    return number(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name, title in COLUMNS.items():
        texts = name in ("experiment", "run", "clip_model", "note")
        table.add_column(title, justify="left" if texts else "right", overflow="fold", no_wrap=not texts)
    for row in rows:
        table.add_row(*[Text(_cell(row, name)) for name in COLUMNS])
    console = Console()
    if not console.is_terminal:
        console.width = 220  # a file or a pipe has no edge
    console.print(table)
    console.print(LEGEND, style="dim", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
        AntherError: there are no runs.
    """
    parser = argparse.ArgumentParser(prog="python -m diffusion.evaluation.results", description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", default="runs", type=Path, help="where the runs are (runs)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there too, with all digits")
    parser.add_argument("--markdown", action="store_true", help="print it for a document")
    chosen = parser.parse_args(arguments)
    results = collect(chosen.folder)
    if not results.rows and not results.damaged:
        raise AntherError(f"there is no run below {chosen.folder}: train one, or name the folder where they are.")
    if chosen.markdown:
        print(markdown(results.rows))
    else:
        _print(results.rows)
    for line in results.damaged:
        print(f"left out: {line}")
    if chosen.csv is not None:
        write_csv(results.rows, chosen.csv)
        print(f"table        {chosen.csv}")


if __name__ == "__main__":
    cli.run(main)
