"""The images of an evaluation, each a file with a record, made so that a killed run goes on where it stopped.

Image k has the seed `first_seed + k` and the prompt `prompts[k % P]`. The work is cut into chunks of consecutive
images by the batch size alone, and a chunk is drawn whole by one process, so the files do not depend on the number of
processes or on where a run was stopped.
"""

import contextlib
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from diffusion.curation import records
from diffusion.differences import differences
from diffusion.errors import AntherError
from diffusion.evaluation import embeddings
from diffusion.evaluation.embeddings import (
    Embedding,
    capture,
    reconstruct_embedded,
    sample_embedded,
    save_embeddings,
)
from diffusion.evaluation.reals import Reals
from diffusion.files import atomic
from diffusion.guidance import Guidance
from diffusion.images import check_finite, from_uint8, save_png
from diffusion.modules.autoencoder import VariationalAutoencoder
from diffusion.modules.generator import Generator
from diffusion.rng import check_seed
from diffusion.samplers import Sampler

if TYPE_CHECKING:
    import pandas as pd

PROTOCOL = "protocol.json"
PARTS = "parts"


@dataclass(frozen=True)
class Plan:
    """What is drawn.

    Attributes:
        prompts: taken in turn; None for a model without a condition.
        labels: the class that each prompt names, or None.
        num_images: in all.
        first_seed: of image 0.
        weight: guidance weight w of every image; None for a model without a condition alone.
        sampler: draws them; None for a model that draws in one call.
        sampler_record: the sampler as plain values, for the protocol.
        T: steps of the model's schedule, where it has one.
        batch_size: images per chunk.
        embedding: what is kept of the network; None for nothing.
        checkpoint_sha256: of the model's file.
        guidance: all about it but the weight.
        bad_sha256: of the file of the model that guidance leads away from; None without one.
        originals: real images that an autoencoder gives back, image k for image k, in the place of draws; seeds mean
            nothing then.
        precision: Lightning's word for the arithmetic that draws.
        model_config_sha256: of what describes weights from elsewhere as a model; None for a checkpoint of train.py.

    Raises:
        AntherError: fewer than one image, a batch of none, no prompt, or no seed.
    """

    prompts: tuple[str, ...] | None
    labels: tuple[str | None, ...] | None
    num_images: int
    first_seed: int
    weight: float | None
    sampler: Sampler | None
    sampler_record: Mapping[str, Any] | None
    T: int | None
    batch_size: int
    embedding: Embedding | None
    checkpoint_sha256: str
    guidance: Guidance = field(default_factory=Guidance)
    bad_sha256: str | None = None
    originals: Reals | None = None
    precision: str = "32-true"
    model_config_sha256: str | None = None

    def __post_init__(self) -> None:
        for name, count in (("num_images", self.num_images), ("batch_size", self.batch_size)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise AntherError(f"{name} counts images, so it is a whole number from 1 on, not {count}.")
        check_seed(self.first_seed)
        if self.prompts is not None and not self.prompts:
            raise AntherError("the list of prompts is empty: name at least one, or leave it out.")
        if self.labels is not None and len(self.labels) != len(self.prompts or ()):
            raise ValueError("labels belong to prompts, one each")

    @property
    def steps(self) -> int:
        """How many the sampler really takes; 0 without one."""
        if self.sampler is None or self.T is None:
            return 0
        return self.sampler.steps or self.T

    def chunks(self) -> list[range]:
        """Numbers of the images that are drawn together."""
        size, n = self.batch_size, self.num_images
        return [range(start, min(start + size, n)) for start in range(0, n, size)]

    def prompt(self, k: int) -> str | None:
        """The prompt of image k."""
        return None if self.prompts is None else self.prompts[k % len(self.prompts)]

    def label(self, k: int) -> str | None:
        """The class of image k."""
        if self.originals is not None:
            return None if self.originals.labels is None else self.originals.labels[k]
        return None if self.labels is None else self.labels[k % len(self.labels)]


class Made(NamedTuple):
    """What one call drew; what lay there already does not count.

    Attributes:
        images: how many.
        seconds: how long it took, files included.
    """

    images: int
    seconds: float


def check(model: Generator, plan: Plan) -> None:
    """Finds out before anything is written whether the model can do what the plan asks for.

    Raises:
        AntherError: it takes no prompts or needs some, cannot read one, takes no weight, lacks the layer, or has not
            as many steps.
        ValueError: the plan leaves T or the weight of a guided model open.
    """
    if plan.T != model.T or (plan.weight is None and model.weight is not None):
        raise ValueError("a plan names the model's T and, under guidance, the weight")
    if plan.sampler is not None and model.sampler is None:
        raise AntherError("this model draws in one call and takes no sampler: leave sampler= out.")
    if plan.prompts is None and model.conditioner is not None:
        raise AntherError("this model draws from prompts and none were given: set prompts=[a red rose] or the like.")
    model.check_request(plan.prompts, 1 if plan.prompts is None else len(plan.prompts), plan.weight, plan.guidance)
    if plan.originals is not None:
        _check_reconstruction(model, plan, plan.originals)
    if plan.embedding is not None:
        with capture(model.trained, plan.embedding.layer):
            pass
        if plan.embedding.steps and model.sampler is None:
            raise AntherError(
                "this model draws in one call, which has no steps to trace: set embedding.when to last or clean."
            )
        if late := [step for step in plan.embedding.steps if step >= plan.steps]:
            raise AntherError(f"embedding.steps has {late}, but the {plan.steps} steps are 0 to {plan.steps - 1}.")


def _check_reconstruction(model: Generator, plan: Plan, originals: Reals) -> None:
    if not isinstance(model, VariationalAutoencoder):
        raise AntherError(
            "reconstruct puts real images through an autoencoder, and this model is none: leave reconstruct out."
        )
    if plan.num_images > len(originals.rows):
        raise AntherError(
            f"the split {originals.split} has {len(originals.rows)} images to reconstruct, not {plan.num_images}: set "
            f"num_images={len(originals.rows)} or less, or another split."
        )


def generate(
    model: Generator,
    plan: Plan,
    folder: Path,
    rank: int = 0,
    world: int = 1,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Made:
    """Draws the images of a plan that a folder does not hold yet: PNG files, then their embeddings.

    Args:
        model: on the device that draws.
        plan: the same in all processes.
        folder: of the run, claimed for this plan (see `claim`).
        rank: of this process; it takes every world-th chunk.
        world: number of processes.
        autocast: makes the context of the model's calls, such as `fabric.autocast`.

    Raises:
        AntherError: as `check`; an image is not finite, of whose chunk nothing is written; a file cannot be written.
    """
    from rich.progress import track

    check(model, plan)
    model.eval()
    mine = [chunk for chunk in plan.chunks()[rank::world] if not _is_done(plan, folder, chunk)]
    started = time.perf_counter()
    for chunk in track(mine, description="drawing", disable=rank > 0 or not mine):
        with autocast():
            images, rows = _draw(model, plan, chunk)
        _check_finite(chunk, images, rows)
        for k, image in zip(chunk, images, strict=True):
            save_png(image, folder / _file(k))
        if rows is not None and not (folder / embeddings.FILE).exists():
            save_embeddings(_part(folder, chunk), [_id(k) for k in chunk], rows)
    return Made(sum(map(len, mine)), time.perf_counter() - started)


def assemble(plan: Plan, folder: Path) -> "pd.DataFrame":
    """Joins what `generate` left: `embeddings.npy`, `records.parquet`; the parts are removed.

    In a folder that is assembled already the records are returned as they are, with the columns that were added since.
    New records have no scores: `metrics.json`, if there was one, is removed.

    Raises:
        AntherError: chunks are missing, or a file cannot be written.
    """
    chunks = plan.chunks()
    if missing := [chunk for chunk in chunks if not _is_done(plan, folder, chunk)]:
        raise AntherError(
            f"{len(missing)} of {len(chunks)} batches are not in {folder} yet (first: images {_id(missing[0][0])} to "
            f"{_id(missing[0][-1])}): run the same command with this hydra.run.dir again."
        )
    if plan.embedding is not None and not (folder / embeddings.FILE).exists():
        _join_embeddings(plan, folder)
    if not (folder / records.FILE).exists():
        records.write(folder, _records(plan))
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    return records.read(folder)


def file_scores(plan: Plan, folder: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes the records anew with these columns: those of an earlier scoring, and `metrics.json`, are gone.

    Args:
        plan: of the images.
        folder: of the run.
        columns: by name, one value per image in the order of the ids.

    Raises:
        AntherError: the folder cannot be written.
    """
    records.write(folder, _records(plan).assign(**{name: list(values) for name, values in columns.items()}))


def claim(folder: Path, protocol: Mapping[str, Any]) -> None:
    """Writes what a folder is made with, or finds that it is being made with the same.

    Args:
        folder: of the run.
        protocol: plain values for JSON.

    Raises:
        AntherError: the folder belongs to another protocol (names what differs), or its protocol is damaged.
    """
    path = Path(folder) / PROTOCOL
    here = json.loads(json.dumps(protocol))
    if not path.exists():
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(here, indent=2) + "\n")
        return
    try:
        there = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise AntherError(f"{path} is damaged: choose another hydra.run.dir, or delete that folder.") from error
    if found := differences(there, here):
        raise AntherError(
            f"{folder} holds images of other settings: {found}; give the same settings, or another hydra.run.dir."
        )


def _id(k: int) -> str:
    return f"{k:06d}"


def _file(k: int) -> str:
    return f"images/{_id(k)}.png"


def _part(folder: Path, chunk: range) -> Path:
    return folder / PARTS / f"{_id(chunk[0])}-{_id(chunk[-1])}.npz"


def _is_done(plan: Plan, folder: Path, chunk: range) -> bool:
    kept = plan.embedding is None or (folder / embeddings.FILE).exists() or _part(folder, chunk).exists()
    return kept and all((folder / _file(k)).exists() for k in chunk)


def _draw(model: Generator, plan: Plan, chunk: range) -> tuple[Tensor, Tensor | None]:
    if plan.originals is not None:
        assert isinstance(model, VariationalAutoencoder)
        images = from_uint8(plan.originals.pixels[chunk.start : chunk.stop]).to(model.device)
        if plan.embedding is None:
            return model.reconstruct(images).cpu(), None
        back, rows = reconstruct_embedded(model, plan.embedding, images)
        return back.cpu(), rows
    prompts = None if plan.prompts is None else [str(plan.prompt(k)) for k in chunk]
    seeds = [plan.first_seed + k for k in chunk]
    if plan.embedding is None:
        return model.sample(prompts, seeds, plan.weight, plan.sampler, guidance=plan.guidance).cpu(), None
    images, rows = sample_embedded(model, plan.embedding, prompts, seeds, plan.weight, plan.sampler, plan.guidance)
    return images.cpu(), rows


def _check_finite(chunk: range, images: Tensor, rows: Tensor | None) -> None:
    check_finite(images, [_id(k) for k in chunk])
    if rows is not None and not rows.isfinite().all():
        raise AntherError(
            f"embeddings of the images {_id(chunk[0])} to {_id(chunk[-1])} are not finite: use an earlier checkpoint, "
            "or trainer.precision=32."
        )


def _join_embeddings(plan: Plan, folder: Path) -> None:
    """Writes all parts as one array, one part in memory at a time."""
    with atomic(folder / embeddings.FILE) as temporary, temporary.open("wb") as file:
        for chunk in plan.chunks():
            rows = _read_part(folder, chunk)
            if chunk[0] == 0:
                # Not a memory map, which dies of a full disk without an error.
                header = {"descr": "<f4", "fortran_order": False, "shape": (plan.num_images, *rows.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(rows, "<f4").data)


def _read_part(folder: Path, chunk: range) -> np.ndarray:
    path = _part(folder, chunk)
    try:
        with np.load(path, allow_pickle=False) as part:
            ids, rows = part["ids"].tolist(), part["embeddings"]
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise AntherError(f"{path} is damaged: delete it and run the same command again.") from error
    if ids != [_id(k) for k in chunk]:
        raise AntherError(f"{path} holds embeddings of other images: delete it and run the same command again.")
    result: np.ndarray = rows
    return result


def _records(plan: Plan) -> "pd.DataFrame":
    import pandas as pd

    numbers = range(plan.num_images)
    return pd.DataFrame(
        {
            "id": [_id(k) for k in numbers],
            "prompt": [plan.prompt(k) for k in numbers],
            "label": [plan.label(k) for k in numbers],
            "seed": [plan.first_seed + k if plan.originals is None else None for k in numbers],
            "guidance_weight": None if plan.weight is None else float(plan.weight),
            "sampler": None if plan.sampler is None else type(plan.sampler).__name__,
            "steps": plan.steps,
            "checkpoint": plan.checkpoint_sha256,
            "file": [_file(k) for k in numbers],
            **({} if plan.originals is None else {"original": plan.originals.names[: plan.num_images]}),
        }
    )
