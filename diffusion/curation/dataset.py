"""The FiftyOne dataset of a run, from the files in its folder."""

import hashlib
import math
import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from diffusion.curation import brain, database, records
from diffusion.errors import AntherError
from diffusion.evaluation.report import public, read_metrics
from diffusion.threads import as_many_as_before

if TYPE_CHECKING:
    import pandas as pd

    from diffusion.evaluation.rows import Rows

EMBEDDING = "unet_embedding"
SCORES = ("uniqueness", "representativeness", "representativeness_closeness")
VIEWED = 50  # images in a saved view, and at most a quarter of all
UMAP_NEIGHBOURS = 15

DEFINITIONS = {
    "prompt": "the text that the image was made from",
    "label": "the class that the prompt names, or of the original",
    "clip_score": "cosine of the CLIP embeddings of image and prompt, higher = better fit; the model is in the metrics",
    EMBEDDING: "what the U-Net knows about the image: output of the layer in run.embedding, flattened",
    "guidance_weight": "w in e = (1 + w) e_c - w e_u; the paper's scale is 1 + w",
    "nearest_distance": "distance to the nearest training image, in the space its metric names; near 0 = memorised",
    "nearest_real": "the training image nearest to this one",
    "nearest_row": "row of that image in the data table",
    "original": "the real image that this one is a reconstruction of",
    "psnr": "peak signal-to-noise ratio to the original, in dB; higher = nearer",
    "ssim": "structural similarity to the original (Wang et al., 2004), 1 at best",
    "realism": "Kynkäänniemi et al., 2019, arXiv:1904.06991: higher = deeper within the real images",
    "inception_entropy": "entropy of Inception's classes, in nats; lower = more certain",
    "pseudo_label": "the digit that the classifier finds likeliest",
    "final_label": "the same, or IDK where the classifier declines; confidence is that of its prediction",
    "rejection_type": "none; soft: less sure than the threshold; hard: the classifier's own class IDK",
    "is_idk": "whether the classifier declines",
    "classifier_confidence": "probability of the classifier's prediction, IDK included, after temperature scaling",
    "runner_up": "the second-likeliest digit",
    "margin": "by how much less probable the second-likeliest digit is, among digits",
    "sample_index": "number of the image in its run",
    "run": "folder of the run",
    **brain.DEFINITIONS,
}

# name: (field, descending); of several with one name the first whose field exists.
VIEWS = (
    ("best", "clip_score", True),
    ("best", "realism", True),
    ("worst", "clip_score", False),
    ("worst", "realism", False),
    ("most unique", "uniqueness", True),
    ("least unique", "uniqueness", False),
    ("nearest to training data", "nearest_distance", False),
    ("most confused", "margin", False),
)


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        folder: absolute.
        frame: its records, sorted by id.
        embeddings: (N, D), row i of record i, in their file; or None.
        facts: `run` and `metrics` of metrics.json.
    """

    folder: Path
    frame: "pd.DataFrame"
    embeddings: "Rows | None"
    facts: Mapping[str, Any] = field(default_factory=dict)


def read_run(folder: Path | str) -> Run:
    """Reads a run's folder.

    Raises:
        AntherError: no records, or files that do not fit together.
    """
    folder = Path(folder).absolute()
    frame = records.read(folder)
    if frame.empty:
        raise AntherError(f"{folder / records.FILE} is empty: generate images first.")
    absent = [name for name in frame["file"] if not (folder / name).is_file()]
    if absent:
        raise AntherError(
            f"{folder} lacks {len(absent)} images of its records (first: {absent[0]}): generate them anew."
        )
    embeddings = None
    if (folder / "embeddings.npy").exists():
        from diffusion.evaluation.embeddings import open_rows

        embeddings = open_rows(folder)
        if len(embeddings) != len(frame):
            raise AntherError(
                f"{folder / 'embeddings.npy'} has {len(embeddings)} rows for {len(frame)} records: delete it and "
                "evaluate again."
            )
    facts: dict[str, Any] = {"run": {}, "metrics": {}}
    if (folder / "metrics.json").exists():
        facts_of_run, results = read_metrics(folder)
        facts = {"run": public(facts_of_run), "metrics": {key: result.record() for key, result in results.items()}}
    return Run(folder, frame, embeddings, facts)


def build_dataset(folder: Path | str, name: str) -> str:
    """Builds the FiftyOne dataset of a run from the files in its folder.

    Its samples have the fields of DEFINITIONS and every other column of the records, and the tag `w=3.0` for their
    guidance weight. Brain computes `uniqueness` and `representativeness` on the run's embeddings, never on its own;
    they and `representativeness_closeness` go back into the records. The dataset has the visualisations `umap` and
    `pca`, the saved views of VIEWS, and in `info` the run, its metrics, the definitions of the fields, and what was
    left out and why. It stays in the database; one of the same name is replaced when the new one is whole.

    Returns:
        The dataset's name.

    Raises:
        AntherError: files are missing or do not fit together, or there is no database; see `database.ready`.
    """
    run = read_run(folder)
    with database.held():
        scores = assemble([run], name, run.facts)
    if scores:
        records.with_columns(run.folder, scores)
    return name


def assemble(runs: Sequence[Run], name: str, info: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Builds one dataset of one or more runs; see `build_dataset`.

    Args:
        runs: at least one; from two on, the field `run` tells them apart.
        name: of the dataset.
        info: goes into its `info`.

    Returns:
        The scores that were computed, one value per sample; None where a score has none.
    """
    fo = database.ready()
    # FiftyOne deletes what is not persistent when its last process ends: a killed build leaves nothing. Containers that
    # share a database may share their PIDs.
    dataset = fo.Dataset(f"anther in making {uuid4().hex}")
    try:
        embeddings, left_out = _joined(runs)
        samples = []
        for run, run_name in zip(runs, run_names(runs), strict=True):
            of_run = {"run": run_name} if len(runs) > 1 else {}
            for k, row in enumerate(run.frame.to_dict("records")):
                samples.append(_sample(fo, run.folder, k, row, of_run))
        if embeddings is not None:
            for sample, row in zip(samples, embeddings, strict=True):
                sample[EMBEDDING] = row
        dataset.add_samples(samples)
        scores: dict[str, list[float | None]] = {}
        if embeddings is not None:
            scores = _score(dataset, embeddings, left_out)
            _visualise(dataset, embeddings, left_out)
        _save_views(dataset)
        definitions = {key: text for key, text in DEFINITIONS.items() if dataset.has_field(key)}
        for key, text in definitions.items():
            described = dataset.get_field(key)
            described.description = text
            described.save()
        dataset.info = {**info, "definitions": definitions, "left_out": left_out}
        dataset.save()
        rename(dataset, name)
    except BaseException:
        dataset.delete()
        raise
    return scores


def rename(dataset: Any, name: str) -> None:
    """Gives a finished dataset its name, in the place of one that has it, and makes it stay.

    Raises:
        AntherError: FiftyOne does not take the name.
    """
    fo = database.ready()
    if fo.dataset_exists(name):
        fo.delete_dataset(name)
    try:
        dataset.name = name
    except ValueError as error:
        raise _refused(name, error) from error
    dataset.persistent = True


def own_name(name: str, folder: Path | str) -> str:
    """The name, with a digest of the folder's path where it is none for FiftyOne or not free; see `taken_by`."""
    database.ready()  # outside: without a database no name is better than another
    try:
        free = taken_by(name, [folder]) is None
    except AntherError:
        free = False
    return name if free else f"{name} {hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:6]}"


def name_for(folder: Path | str, asked: str | None = None) -> str:
    """The name of a run's dataset: the one that is asked for, else the folder's own; see `own_name`.

    Raises:
        AntherError: the name that is asked for is none for FiftyOne or not free.
    """
    run = Path(folder).absolute()
    if asked is None:
        return own_name(f"{run.parent.name}-{run.name}", run)
    check_free(asked, [run], f"dataset.name={asked}")
    return asked


def check_free(name: str, folders: Sequence[Path | str], what: str) -> None:
    """Refuses a name that is not free for the images of some folders; see `taken_by`.

    Args:
        name: of a dataset to be.
        folders: whose images it will have.
        what: would replace another dataset, for the sentence.

    Raises:
        AntherError: the name is none for FiftyOne or not free.
    """
    if (other := taken_by(name, folders)) is not None:
        delete = shlex.join(["fiftyone", "datasets", "delete", other])
        where = "this folder's" if len(folders) == 1 else "these folders'"
        raise AntherError(
            f"{what} would replace the FiftyOne data set {other!r}, which is not of {where} images alone: choose "
            f"another name, or remove that one with `{delete}`."
        )


def taken_by(name: str, folders: Sequence[Path | str]) -> str | None:
    """The dataset that has a name, unless its images are all in the folders; None where the name is free.

    It is that of other runs, or of these from where they lay before: not ours to replace. To FiftyOne names that differ
    in marks and capitals alone are one.

    Raises:
        AntherError: a name without a Latin letter or a digit, which FiftyOne does not take, or no database.
    """
    fo, runs = database.ready(), [Path(folder).resolve() for folder in folders]
    import fiftyone.core.odm as foo
    import fiftyone.core.utils as fou

    try:
        found = foo.get_db_conn().datasets.find_one({"slug": fou.to_slug(name)})
    except ValueError as error:
        raise _refused(name, error) from error
    if found is None:
        return None
    theirs = {Path(file).parent.resolve() for file in fo.load_dataset(found["name"]).values("filepath")}
    ours = theirs and all(any(path.is_relative_to(run) for run in runs) for path in theirs)
    return None if ours and found["name"] == name else str(found["name"])


def _refused(name: str, error: ValueError) -> AntherError:
    return AntherError(f"FiftyOne takes no dataset named {name!r} ({error}): choose another name.")


def run_names(runs: Sequence[Run]) -> list[str]:
    """The runs' folders, as short as they can be told apart."""
    common = os.path.commonpath([run.folder.parent for run in runs])
    return [run.folder.relative_to(common).as_posix() for run in runs]


def _sample(fo: Any, folder: Path, index: int, row: Mapping[str, Any], extra: Mapping[str, Any]) -> Any:
    values = {key: plain(value) for key, value in row.items() if key not in ("id", "file", *SCORES)}
    for key in ("prompt", "label", "pseudo_label", "final_label"):
        if values.get(key) is not None:
            sure = values.get("classifier_confidence") if key == "final_label" else None
            values[key] = fo.Classification(label=values[key], confidence=sure)
    weight = values.get("guidance_weight")
    return fo.Sample(
        filepath=str(folder / row["file"]),
        tags=[] if weight is None else [f"w={float(weight)}"],
        sample_index=index,
        **{key: value for key, value in values.items() if value is not None},
        **extra,
    )


def plain(value: Any) -> Any:
    """A cell of the records as a plain value; None for NaN, which JSON and MongoDB's order do not know."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value


def _joined(runs: Sequence[Run]) -> tuple[NDArray[np.floating] | None, list[str]]:
    """The embeddings of all runs (N, D), or None and why."""
    lengths = {None if run.embeddings is None else run.embeddings.shape[1] for run in runs}
    if lengths == {None}:
        return None, [f"{EMBEDDING}, {', '.join(SCORES)}, umap, pca: the run has no embeddings.npy"]
    if None in lengths or len(lengths) > 1:
        return None, [f"{EMBEDDING}, {', '.join(SCORES)}, umap, pca: the runs' embeddings are not of one length"]
    return np.concatenate([run.embeddings[:] for run in runs if run.embeddings is not None]), []


def _score(dataset: Any, embeddings: NDArray[np.floating], left_out: list[str]) -> dict[str, list[float | None]]:
    import fiftyone.brain as fob

    n = len(dataset)
    closeness = brain.representativeness_closeness(embeddings, every=True)  # refuses what is not finite
    # Without `embeddings` Brain would use a classifier of CIFAR-10, silently.
    fob.compute_uniqueness(dataset, uniqueness_field="uniqueness", embeddings=EMBEDDING)
    if n >= brain.CLUSTERS:
        with np.errstate(invalid="ignore"):  # 0 / 0 in a cluster of one
            fob.compute_representativeness(dataset, representativeness_field="representativeness", embeddings=EMBEDDING)
    else:
        left_out.append(f"representativeness: Brain needs {brain.CLUSTERS} images, here are {n}")
    dataset.set_values("representativeness_closeness", closeness.tolist())
    scores: dict[str, list[float | None]] = {}
    for name in SCORES:
        if not dataset.has_field(name):
            continue
        values = [plain(value) for value in dataset.values(name)]
        undefined = values.count(None)
        if undefined:
            dataset.set_values(name, values)
            left_out.append(f"{name} of {undefined} of {n} images, for which Brain has no value")
        if undefined < n:
            scores[name] = values
    return scores


def _visualise(dataset: Any, embeddings: NDArray[np.floating], left_out: list[str]) -> None:
    import fiftyone.brain as fob

    n, d = embeddings.shape
    if n <= UMAP_NEIGHBOURS:
        left_out.append(f"umap: it needs more than {UMAP_NEIGHBOURS} images, here are {n}")
    else:
        with as_many_as_before(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "n_jobs value")  # a seed makes it serial
            fob.compute_visualization(
                dataset, embeddings=embeddings, brain_key="umap", method="umap", num_dims=2, seed=0, verbose=False
            )
    if min(n, d) < 2:
        left_out.append(f"pca: two dimensions need two images and two numbers, here are {n} and {d}")
    else:
        results = fob.compute_visualization(
            dataset, embeddings=embeddings, brain_key="pca", method="pca", num_dims=2, seed=0
        )
        # A pickle of the projection, which has no place in a dataset that is published.
        results._reducer = results._reducer_blob = None
        results.save()


def _save_views(dataset: Any) -> None:
    limit = min(VIEWED, math.ceil(len(dataset) / 4))
    for name, key, descending in VIEWS:
        if dataset.has_field(key) and not dataset.has_saved_view(name):
            view = dataset.exists(key).sort_by(key, reverse=descending).limit(limit)
            dataset.save_view(name, view, description=f"{'highest' if descending else 'lowest'} {key}")
