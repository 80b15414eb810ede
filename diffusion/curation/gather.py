"""Several runs, such as those of a sweep, as one FiftyOne dataset.

python -m diffusion.curation.gather FOLDER... --name NAME
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffusion import cli
from diffusion.curation.dataset import assemble, read_run, run_names
from diffusion.errors import AntherError


def gather(folders: Sequence[Path | str], name: str) -> str:
    """Builds one dataset of several runs.

    As `build_dataset`, with a field `run`, and with the scores computed over all images together. The runs' records
    keep their own scores. `info["runs"]` lists each run's facts and metrics.

    Args:
        folders: of the runs, each once.
        name: of the dataset.

    Returns:
        The dataset's name.

    Raises:
        AntherError: as `build_dataset`, or a folder given twice.
    """
    runs = [read_run(folder) for folder in folders]
    if not runs or len({run.folder.resolve() for run in runs}) < len(runs):
        raise AntherError("gather: give the folder of each run once.")
    of_run = [{"name": run_name, **run.facts} for run, run_name in zip(runs, run_names(runs), strict=True)]
    assemble(runs, name, {"runs": of_run})
    return name


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m diffusion.curation.gather", description=gather.__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of a run of evaluate.py")
    parser.add_argument("--name", required=True, help="of the dataset; one of that name is replaced")
    options = parser.parse_args(arguments)
    name = gather(options.folders, options.name)
    print(f"dataset {name!r} is made; look at it: python -m diffusion.curation.app {name!r}")


if __name__ == "__main__":
    cli.run(main)
