"""One run of analyze.py: measure, look for what to clean, and put it on one page."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from diffusion.build import build
from diffusion.errors import AntherError, install
from diffusion.files import atomic


def analyze(config: Mapping[str, Any], folder: Path) -> None:
    """Analyses the data set that the config describes; nothing of it is changed.

    Args:
        config: that of conf/analyze.yaml, resolved.
        folder: gets `report.html`, `analysis.json`, `images.csv`, `findings.csv`, `exclude.csv` and `plots/`.

    Raises:
        AntherError: the data are missing, or a library is, or the config names a reason that there is not.
    """
    _check_installed()
    from datamodules.analysis import cleansing, measure, plots, report
    from datamodules.exclusion import write_exclusions
    from datamodules.folders import FolderImages

    if unknown := set(config["reasons"]) - set(cleansing.REASONS):
        raise AntherError(f"reasons={sorted(unknown)} are not known: choose from {', '.join(cleansing.REASONS)}.")
    # Files that cannot be decoded are what is looked for here, so they do not stop it, nor does a class of no others.
    skip = {"on_corrupt": "skip"} if "on_corrupt" in config["data"] else {}
    datamodule = build({**config["data"], **skip})
    if isinstance(datamodule, FolderImages):
        datamodule.needs_every_class = False
    datamodule.prepare_data()
    datamodule.setup()
    print(datamodule.describe())
    table = datamodule.table
    limits = cleansing.Limits(**config["limits"])
    measured = measure.measure_all(table, datamodule.splits)
    found = [
        finding
        for finding in cleansing.find(table, measured, table.images.shape[-1], limits, config["reasons"])
        if finding.name not in datamodule.excluded
    ]
    listed = [*datamodule.exclusions, *(finding for finding in found if finding.reason in config["reasons"])]
    summary = {
        "data": datamodule.name,
        "digest": table.digest,
        "describe": datamodule.describe(),
        "made": f"{datetime.now():%Y-%m-%d %H:%M}",
        "protocol": {
            "originals": "sizes and values are those of the files, before resizing and cropping"
            if table.files
            else "these images are no files: sizes and values are those that the network sees",
            "limits": asdict(limits),
            "std": "divided by N",
        },
        **measure.summarise(measured, table),
        "findings": report.count(
            found, config["reasons"], dict(zip(measured.frame["name"], measured.frame["split"], strict=True))
        ),
        "excluded": len({finding.name for finding in listed}),
    }
    words = measured.frame["name"].map(_reasons(found)).fillna("")
    with atomic(folder / "images.csv") as temporary:
        measured.frame.drop(columns="row").assign(findings=words).to_csv(temporary, index=False)
    write_exclusions(folder / "findings.csv", found)
    write_exclusions(folder / "exclude.csv", listed)
    with atomic(folder / "analysis.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", "utf-8")
    captions = plots.draw(folder, table, measured, summary, found)
    command = f"python train.py ... data.exclude={folder / 'exclude.csv'}"
    page = report.write_page(folder, summary, found, captions, command)
    _farewell(summary, folder, page, command)


def _reasons(found: Any) -> dict[str, str]:
    words: dict[str, list[str]] = {}
    for finding in found:
        words.setdefault(finding.name, []).append(finding.reason)
    return {name: " ".join(dict.fromkeys(reasons)) for name, reasons in words.items()}


def _check_installed() -> None:
    missing = [name for name in ("cleanvision", "imagehash", "pandas", "scipy", "jinja2") if not _installed(name)]
    if missing:
        raise AntherError(
            f"analysing needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"{install('analysis')}."
        )


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _farewell(summary: Mapping[str, Any], folder: Path, page: Path, command: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column, justify in (("finding", "left"), ("images", "right"), ("twin elsewhere", "right"), ("listed", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for reason, counts in summary["findings"].items():
        if counts["images"]:
            across = str(counts["across_splits"] or "")
            table.add_row(reason, f"{counts['images']:,}", across, "yes" if counts["listed"] else "")
    sizes = summary["sizes"]
    print(
        f"{sizes['width']['mean']:.2f} x {sizes['height']['mean']:.2f} pixels on average (deviation "
        f"{sizes['width']['std']:.2f} x {sizes['height']['std']:.2f}), aspect {sizes['aspect']['mean']:.4f}"
    )
    if table.row_count:
        Console().print(table)
    if empty := summary["empty_classes"]:
        print(f"no image to be decoded: {', '.join(empty)}; fill their folders, or leave them out of data.classes")
    if not table.row_count and not empty:
        print("nothing to clean was found")
    print(f"the page              {page}")
    print(f"numbers               {folder / 'analysis.json'}, by image {folder / 'images.csv'}")
    print(f"what was found        {folder / 'findings.csv'}")
    print(f"images to leave out   {folder / 'exclude.csv'}: {summary['excluded']} images, to be read and edited")
    print(f"train without them    {command}")
