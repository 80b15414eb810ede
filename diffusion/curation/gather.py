"""Several runs, such as those of a sweep, as one FiftyOne dataset.

python -m diffusion.curation.gather FOLDER... --name NAME

A FOLDER is that of a run, or that of a sweep for all of its runs.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from diffusion import cli
from diffusion.curation import database, records
from diffusion.curation.dataset import assemble, check_free, read_run, run_names
from diffusion.errors import AntherError
from diffusion.evaluation.results import run_folders


def gather(folders: Sequence[Path | str], name: str) -> str:
    """Builds one dataset of several runs.

    As `build_dataset`, with a field `run`, and with the scores computed over all images together. The runs' records
    keep their own scores. `info["runs"]` lists each run's facts and metrics.

    Args:
        folders: of the runs, each once.
        name: of the dataset; an older one of these runs' images alone is replaced.

    Returns:
        The dataset's name.

    Raises:
        AntherError: as `build_dataset`, a folder given twice, or a name that another dataset has.
    """
    runs = [read_run(folder) for folder in folders]
    if not runs or len({run.folder.resolve() for run in runs}) < len(runs):
        raise AntherError("gather: give the folder of each run once.")
    of_run = [{"name": run_name, **run.facts} for run, run_name in zip(runs, run_names(runs), strict=True)]
    with database.held():
        check_free(name, [run.folder for run in runs], f"--name {shlex.quote(name)}")
        assemble(runs, name, {"runs": of_run})
    return name


def find_runs(paths: Sequence[Path | str]) -> list[Path]:
    """The folders of the runs that are meant by paths, in their order.

    A folder with records is that of a run. One without stands for the runs below it, in the order of their numbers;
    those that have no records, such as a job of a sweep that failed, are named and left out. Files are passed over: a
    sweep has some beside its runs, so that `runs/sweep/*` names them too.

    Raises:
        AntherError: a path is neither, or all are files.
    """
    found: list[Path] = []
    folders = [path for path in map(Path, paths) if not path.is_file()]
    for folder in folders:
        below = [folder] if _has_records(folder) else list(run_folders(folder))
        runs = [run for run in below if _has_records(run)]
        if not runs:
            raise AntherError(
                f"{folder} is no folder of a run of evaluate.py, which has a {records.FILE}, and holds none: leave it "
                "out, or give the folders of runs or that of their sweep."
            )
        for run in below:
            if run not in runs and run != folder:
                print(f"left out: {run} has no {records.FILE}.")
        found += runs
    if not folders:
        raise AntherError("gather was given files alone: give the folders of runs, or that of their sweep.")
    return found


def _has_records(folder: Path) -> bool:
    return (folder / records.FILE).is_file()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m diffusion.curation.gather", description=summary)
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="of a run of evaluate.py, or of a sweep of such runs"
    )
    parser.add_argument(
        "--name",
        required=True,
        help="of the dataset; one of these runs' images alone is replaced, any other of that name is refused",
    )
    options = parser.parse_args(arguments)
    name = gather(find_runs(options.folders), options.name)
    print(f"dataset {name!r} is made; look at it: python -m diffusion.curation.app {name!r}")


if __name__ == "__main__":
    cli.run(main)
