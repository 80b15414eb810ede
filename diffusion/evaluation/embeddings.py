"""What a network knows about an image: the output of one of its layers."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.errors import AntherError
from diffusion.files import atomic

Form = Literal["pooled", "flat", "raw"]


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
        """The forward hook."""
        self.calls += 1
        self._latest = output.detach()

    def rows(self, n: int) -> Tensor:
        """The latest output for n images, row i for image i, (n, ...).

        Under guidance a layer behind the condition sees 2 n rows in one call, those with the condition first; these
        are the ones returned.

        Raises:
            RuntimeError: the layer was not called, or its rows are not those of n images.
        """
        if self._latest is None:
            raise RuntimeError(f"the layer {self.layer!r} was not called")
        if len(self._latest) not in (n, 2 * n):
            raise RuntimeError(f"{self.layer!r} gave {len(self._latest)} rows for {n} images")
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
