"""A run's dataset as files for others: FiftyOne's format, and an image folder for Hugging Face `datasets`."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from diffusion.curation import database
from diffusion.curation.dataset import EMBEDDING, check_free, plain, read_run, rename
from diffusion.errors import AntherError
from diffusion.evaluation.rows import parts

DATASET = "dataset"
IMAGEFOLDER = "imagefolder"
SPLIT = "test"
_GROUP = 1000  # Images whose embeddings are in memory at a time; what `datasets` would write, too.


def export_fiftyone(name: str, folder: Path | str) -> Path:
    """Writes a dataset of the database as a FiftyOneDataset: `samples.json`, `metadata.json`, `data/` with the images.

    Fields, embeddings, tags, saved views, visualisations and `info` are in it, and no path of this machine among the
    samples. It replaces an older export when it is whole.

    Args:
        name: of the dataset.
        folder: of the run; the export goes to `dataset` in it.

    Returns:
        The folder of the export.

    Raises:
        AntherError: there is no such dataset or no database, or the folder cannot be written.
    """
    fo = database.ready()
    if not fo.dataset_exists(name):
        raise AntherError(f"the database has no dataset {name!r}: build it first.")
    target = Path(folder) / DATASET
    with database.held(), _whole_folder(target) as temporary:
        fo.load_dataset(name).export(
            export_dir=str(temporary), dataset_type=fo.types.FiftyOneDataset, export_media=True, progress=False
        )
    return target


def exported_name(folder: Path | str) -> str | None:
    """The name of the dataset that a run's export is of; None where there is no export.

    Raises:
        AntherError: the export is damaged.
    """
    path = Path(folder) / DATASET / "metadata.json"
    if not path.exists():
        return None
    try:
        return str(json.loads(path.read_text())["name"])
    except (ValueError, KeyError) as error:
        raise AntherError(f"{path} is damaged: delete {path.parent} and evaluate again.") from error


def load_exported(folder: Path | str, name: str) -> str:
    """Loads an export into the database, from wherever it lies now.

    Args:
        folder: of the run, or the export itself.
        name: for the dataset; an older one of this folder's images alone is replaced when the new one is whole.

    Returns:
        The dataset's name.

    Raises:
        AntherError: there is no export or it is damaged, another dataset has the name, or there is no database.
    """
    source = Path(folder).absolute()
    if not (source / "samples.json").exists():
        source = source / DATASET
    if not (source / "samples.json").exists() or not (source / "metadata.json").exists():
        raise AntherError(f"{source} is no FiftyOneDataset (samples.json, metadata.json, data/): export it first.")
    fo = database.ready()
    check_free(name, [folder], f"{source}, loaded as {name!r},")
    dataset = fo.Dataset(f"anther in loading {uuid4().hex}")
    try:
        dataset.add_dir(dataset_dir=str(source), dataset_type=fo.types.FiftyOneDataset, progress=False)
        rename(dataset, name)
    except AntherError:
        dataset.delete()
        raise
    except Exception as error:
        dataset.delete()
        raise AntherError(f"{source} is damaged ({type(error).__name__}: {error}): export it again.") from error
    return name


def export_imagefolder(folder: Path | str) -> Path:
    """Writes a run as an image folder with metadata, which needs neither FiftyOne nor its database.

    `datasets.load_dataset("imagefolder", data_dir=...)` gives the split `test` with `image`, every column of the
    records with a value but `file`, and `unet_embedding` where the run has embeddings. It replaces an older export when
    it is whole.

    Args:
        folder: of the run; the export goes to `imagefolder` in it.

    Returns:
        The folder of the export.

    Raises:
        AntherError: files of the run are missing, or the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = read_run(folder)
    names = [Path(file).name for file in run.frame["file"]]
    columns = {"file_name": pa.array(names)}
    for key in run.frame.columns.drop("file"):
        values = [plain(value) for value in run.frame[key]]
        if any(value is not None for value in values):
            columns[key] = pa.array(values)
    table, schema = pa.table(columns), pa.table(columns).schema
    if run.embeddings is not None:
        kind = pa.list_(pa.float32(), run.embeddings.shape[1])
        schema = schema.append(pa.field(EMBEDDING, kind))
    target = Path(folder) / IMAGEFOLDER
    with _whole_folder(target) as temporary:
        (temporary / SPLIT).mkdir()
        for file, name in zip(run.frame["file"], names, strict=True):
            shutil.copyfile(run.folder / file, temporary / SPLIT / name)
        with pq.ParquetWriter(temporary / SPLIT / "metadata.parquet", schema) as writer:
            for part in parts(len(names), _GROUP):
                rows = table.slice(part.start, part.stop - part.start)
                if run.embeddings is not None:
                    vectors = pa.FixedSizeListArray.from_arrays(run.embeddings[part].ravel(), type=kind)
                    rows = rows.append_column(schema.field(EMBEDDING), vectors)
                writer.write_table(rows)
    return target


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target` that takes its name if the block succeeds, and is removed if not."""
    try:
        for left in target.parent.glob(f".{target.name}-*"):  # by an export that was killed
            shutil.rmtree(left)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            inside = temporary / target.name
            inside.mkdir()
            yield inside
            if target.exists():
                target.rename(temporary / "old")
            inside.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise AntherError(f"cannot write {target} ({error}): free some space or choose another folder.") from error
