"""The record of every image: one row each in `records.parquet`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.errors import AntherError, install
from diffusion.files import atomic

if TYPE_CHECKING:
    import pandas as pd

FILE = "records.parquet"


def read(folder: Path | str) -> "pd.DataFrame":
    """The records of a folder, sorted by id; what is missing in a column of texts is None.

    Raises:
        AntherError: there are none, the file is damaged, or pandas is not installed.
    """
    pandas = _pandas()
    path = Path(folder) / FILE
    if not path.is_file():
        raise AntherError(f"there are no records at {path}: give the folder of a run of evaluate.py.")
    try:
        frame: pd.DataFrame = pandas.read_parquet(path, engine="pyarrow")
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise AntherError(
            f"{path} is damaged and cannot be read: delete it and run evaluate.py again with this hydra.run.dir."
        ) from error
    if missing := {"id", "file"} - set(frame.columns):
        raise AntherError(
            f"{path} has no column {' and '.join(sorted(missing))}, so it is no table of evaluate.py: give the folder "
            "of one of its runs."
        )
    for name in frame.select_dtypes(exclude=["number", "bool"]).columns:
        # pandas reads a missing text as NaN.
        frame[name] = frame[name].astype(object).where(frame[name].notna(), None)
    return frame


def write(folder: Path | str, frame: "pd.DataFrame") -> None:
    """Writes new records of a folder, sorted by id; `metrics.json`, which was of those before, is removed.

    Args:
        folder: of the run; the column `file` is relative to it.
        frame: one row per image, with the columns `id` and `file` at least.

    Raises:
        AntherError: two rows share an id or a file, a file does not exist, or the folder cannot be written.
    """
    _write(Path(folder), frame, new=True)


def _write(folder: Path, frame: "pd.DataFrame", *, new: bool) -> None:
    _pandas()
    for column in ("id", "file"):
        twice = frame[column][frame[column].duplicated()]
        if len(twice):
            raise AntherError(f"{len(twice)} records have the {column} of another one (first: {twice.iloc[0]}).")
    absent = [name for name in frame["file"] if not (folder / name).is_file()]
    if absent:
        raise AntherError(
            f"{len(absent)} of {len(frame)} images are not in {folder} (first: {absent[0]}): run evaluate.py again "
            "with this hydra.run.dir."
        )
    with atomic(folder / FILE) as temporary:
        frame.sort_values("id").reset_index(drop=True).to_parquet(temporary, engine="pyarrow", index=False)
        if new:
            # Before they stand there: a kill in between must not leave them beside metrics of others.
            (folder / "metrics.json").unlink(missing_ok=True)


def with_columns(folder: Path | str, columns: Mapping[str, Sequence[Any]]) -> "pd.DataFrame":
    """Adds or replaces columns of a folder's records, whose metrics stay.

    Args:
        folder: of the run.
        columns: by name, one value per record in the order of the ids.

    Returns:
        The records as they are now on disk.

    Raises:
        AntherError: as `read` and `write`.
        ValueError: a column of another length.
    """
    # Plain lists: pandas would align a Series by its index instead of its order.
    frame = read(folder).assign(**{name: list(values) for name, values in columns.items()})
    _write(Path(folder), frame, new=False)
    return read(folder)


def _pandas() -> Any:
    try:
        import pandas
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise AntherError(f"records need {error.name}, which is not installed: {install('eval')}.") from error
    return pandas
