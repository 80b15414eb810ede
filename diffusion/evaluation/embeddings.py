"""What a network knows about an image: the output of one of its layers."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.errors import AntherError
from diffusion.evaluation.rows import Rows
from diffusion.files import atomic
from diffusion.samplers import Sampler, Step

if TYPE_CHECKING:
    from diffusion.guidance import Guidance
    from diffusion.modules.autoencoder import VariationalAutoencoder
    from diffusion.modules.generator import Generator

Form = Literal["pooled", "flat", "raw"]
When = Literal["last", "clean", "trace"]

FILE = "embeddings.npy"


@dataclass(frozen=True)
class Embedding:
    """Which vector stands for a drawn image.

    Attributes:
        layer: name of a submodule of the network.
        form: see `reduced`.
        when: `last`: the layer's output in the last network call that draws the image; `clean`: in one more call on the
            drawn image, at the least time the network knows, t = 1 / T (entry 0 of the published tables); `trace`: in
            the last call of each of `steps`.
        steps: for `trace`: numbers of steps, 0 for the one that starts at t = 1.

    Raises:
        AntherError: an unknown form or moment, or steps that do not go with it.
    """

    layer: str = "down2"
    form: Form = "pooled"
    when: When = "last"
    steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps or ()))
        for name, value, known in (("form", self.form, get_args(Form)), ("when", self.when, get_args(When))):
            if value not in known:
                raise AntherError(f"embedding.{name} is {', '.join(known[:-1])} or {known[-1]}, not {value!r}.")
        if self.when != "trace" and self.steps:
            raise AntherError("embedding.steps goes with embedding.when=trace alone: set that, or leave the steps out.")
        numbers = all(isinstance(step, int) and not isinstance(step, bool) and step >= 0 for step in self.steps)
        if self.when == "trace" and (not self.steps or not numbers or len(set(self.steps)) != len(self.steps)):
            raise AntherError(
                "embedding.when=trace needs numbers of steps in embedding.steps, each once, counted from 0, not "
                f"{list(self.steps)}."
            )


class Captured:
    """The output of a layer in its latest call.

    Attributes:
        calls: how often the layer was called.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.calls = 0
        self._latest: Tensor | None = None

    def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """The forward hook.

        Raises:
            AntherError: the layer gives out something other than one tensor.
        """
        if not isinstance(output, Tensor):
            raise AntherError(
                f"the layer {self.layer!r} gives out a {type(output).__name__} and no single tensor: choose one of its "
                "parts or the layer around it."
            )
        self.calls += 1
        self._latest = output.detach()

    def rows(self, n: int) -> Tensor:
        """The latest output for n images, row i for image i, (n, ...).

        Under guidance a layer behind the condition sees 2 n rows in one call, those with the condition first; these
        are the ones returned.

        Raises:
            AntherError: the layer was not called, or its rows are not those of n images.
        """
        if self._latest is None:
            raise AntherError(f"the network never called its layer {self.layer!r}: choose one of the layers inside it.")
        if len(self._latest) not in (n, 2 * n):
            raise AntherError(
                f"the layer {self.layer!r} gave {len(self._latest)} rows for {n} images: choose one that keeps rows."
            )
        return self._latest[:n]


@contextmanager
def capture(network: nn.Module, layer: str) -> Iterator[Captured]:
    """Records what a layer gives out, within a block.

    Args:
        network: any module.
        layer: a submodule's name, such as `down2` or `mid_block.0`.

    Raises:
        AntherError: the network has no such layer; names the closest ones.
    """
    layers = dict(network.named_modules())
    if layer not in layers or not layer:
        near = difflib.get_close_matches(layer, layers, n=3, cutoff=0.4)
        top = [name for name, _ in network.named_children()]
        raise AntherError(
            f"the network has no layer {layer!r}; "
            + (f"did you mean {' or '.join(near)}? " if near else "")
            + f"Its parts are: {', '.join(top)}."
        )
    captured = Captured(layer)
    handle = layers[layer].register_forward_hook(captured.hook)
    try:
        # Compiled code does not look for hooks that came after it.
        with torch.compiler.set_stance("force_eager"):
            yield captured
    finally:
        handle.remove()


def reduced(features: Tensor, form: Form) -> Tensor:
    """Features (n, C, H, W) as `pooled` (n, C), the mean over positions; `flat` (n, C * H * W); or `raw`, as they are.

    Raises:
        AntherError: another form.
    """
    match form:
        case "pooled":
            return features.flatten(2).mean(2) if features.ndim > 2 else features
        case "flat":
            return features.flatten(1)
        case "raw":
            return features
    raise AntherError(f"embeddings are pooled, flat or raw, not {form!r}.")


@torch.no_grad()
def sample_embedded(
    model: "Generator",
    embedding: Embedding,
    prompts: Sequence[str] | None,
    seeds: Sequence[int],
    weight: float | None = None,
    sampler: Sampler | None = None,
    guidance: "Guidance | None" = None,
) -> tuple[Tensor, Tensor]:
    """Draws images as `model.sample` does, and takes their embeddings on the way.

    Args:
        model: in evaluation mode.
        embedding: which one.
        prompts: see `Generator.sample`.
        seeds: see `Generator.sample`.
        weight: see `Generator.sample`; under guidance embeddings are those with the condition (at w = -1 no network
            call has it, and they are those without).
        sampler: see `Generator.sample`. Of a step with two calls, `Heun`'s, the second is taken.
        guidance: see `Generator.sample`.

    Returns:
        Images (n, C, H, W) on the model's device, and embeddings, float32 on the CPU: (n, ...), or for a trace
        (n, S, ...) in the order of `embedding.steps`. Row i is of image i.

    Raises:
        AntherError: as `model.sample` and `capture`; the sampler has no such step.
    """
    n = len(seeds)
    traced: dict[int, Tensor] = {}
    with capture(model.trained, embedding.layer) as captured:

        def latest() -> Tensor:
            return reduced(captured.rows(n), embedding.form).float().cpu()

        def note(step: Step) -> None:
            if step.number in embedding.steps:
                traced[step.number] = latest()

        images = model.sample(prompts, seeds, weight, sampler, note if embedding.steps else None, guidance)
        if embedding.when == "trace":
            if late := [step for step in embedding.steps if step not in traced]:
                raise AntherError(f"embedding.steps has {late}, and the sampler takes fewer steps: choose less.")
            return images, torch.stack([traced[step] for step in embedding.steps], 1)
        if embedding.when == "clean":
            model.look_at(images, prompts)
        return images, latest()


@torch.no_grad()
def reconstruct_embedded(
    model: "VariationalAutoencoder", embedding: Embedding, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Gives images back as `model.reconstruct` does, and takes their embeddings on the way.

    Args:
        model: in evaluation mode.
        embedding: which one; `clean` is of what comes back, `last` of the image itself.
        images: (n, C, H, W) in [-1, 1].

    Returns:
        What comes back (n, C, H, W) on the model's device, and embeddings, float32 on the CPU, (n, ...).
    """
    with capture(model.trained, embedding.layer) as captured:
        back = model.reconstruct(images)
        if embedding.when == "clean":
            model.look_at(back, None)
        return back, reduced(captured.rows(len(images)), embedding.form).float().cpu()


def open_rows(folder: Path | str) -> Rows:
    """The embeddings of a folder's images, (N, D), in their file; row i belongs to record i.

    Raises:
        AntherError: there are none, or the file is damaged.
    """
    path = Path(folder) / FILE
    try:
        return Rows.of_npy(path)
    except FileNotFoundError as error:
        raise AntherError(
            f"there are no embeddings at {path}: give the folder of a run of evaluate.py that took them."
        ) from error
    except (OSError, ValueError, EOFError, MemoryError) as error:  # a damaged header may ask for any memory
        raise AntherError(
            f"{path} is damaged and cannot be read: delete it and run evaluate.py again with this hydra.run.dir."
        ) from error


def save_embeddings(
    path: Path | str, ids: Sequence[str], embeddings: Tensor, extra: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """Writes an npz file with `ids` (n,) and `embeddings` (n, ...), float32; row i belongs to id i.

    Args:
        path: ends in `.npz`.
        ids: unique.
        embeddings: one row per id.
        extra: further columns of n values by name.

    Raises:
        AntherError: the file cannot be written.
    """
    columns = {name: np.asarray(values) for name, values in (extra or {}).items()}
    columns |= {"ids": np.asarray(ids), "embeddings": embeddings.float().cpu().numpy()}
    if len({len(column) for column in columns.values()}) != 1 or len(set(ids)) != len(ids):
        raise ValueError("ids must be unique, and every column must have one row per id")
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **columns)
