"""The fixed images that callbacks draw again and again: which they are, and how they are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from diffusion.errors import AntherError
from diffusion.modules.diffusion import ClassifierFreeDiffusion
from diffusion.modules.generator import Generator
from diffusion.samplers import Hook, Sampler


@dataclass(frozen=True)
class Cell:
    """One image to draw.

    Attributes:
        prompt: None without a condition.
        weight: guidance weight w; None without a condition.
        seed: of the image's noise.
    """

    prompt: str | None
    weight: float | None
    seed: int


def cells(
    module: Generator,
    prompts: Sequence[str | int] | None,
    weights: Sequence[float] | None,
    per_prompt: int,
    seed: int,
) -> list[Cell]:
    """What to draw, weight by weight, and within a weight prompt by prompt.

    Image j of a weight has the seed `seed + j`, so the weights can be compared image by image.

    Args:
        module: the model; its own guidance weight is taken if `weights` is None.
        prompts: None without a condition; a number is the name of a class.
        weights: guidance weights.
        per_prompt: images per prompt and weight.
        seed: of the first image.

    Raises:
        AntherError: prompts for a model without a condition, or none for one with it.
    """
    if not isinstance(module, ClassifierFreeDiffusion):
        if prompts or weights:
            raise AntherError(
                "this model has no condition: set prompts and weights of the callbacks that draw to null, or leave "
                "those callbacks out."
            )
        return [Cell(None, None, seed + j) for j in range(per_prompt)]
    if not prompts:
        raise AntherError("this model draws from prompts: list some in callbacks.drawn.prompts.")
    texts = [str(prompt) for prompt in prompts for _ in range(per_prompt)]
    chosen = [float(module.weight)] if weights is None else weights
    return [Cell(text, float(w), seed + j) for w, (j, text) in product(chosen, enumerate(texts))]


def check_weights(part: str, weights: Sequence[float] | None) -> None:
    """Finds out before the first step that nothing would be drawn.

    Args:
        part: name of the callback in the config.
        weights: its guidance weights.

    Raises:
        AntherError: an empty list.
    """
    if weights is not None and not weights:
        raise AntherError(f"callbacks.{part}.weights is empty: list a guidance weight, or null for the module's own.")


def draw(
    module: Generator, wanted: Sequence[Cell], batch_size: int, sampler: Sampler | None = None, hook: Hook | None = None
) -> Tensor:
    """Draws cells, at most `batch_size` at a time; no collective operation, so one rank may draw alone.

    Returns:
        (n, C, H, W) on the CPU, clamped to [-1, 1].
    """
    parts = [
        module.sample(
            None if part[0].prompt is None else [str(cell.prompt) for cell in part],
            [cell.seed for cell in part],
            None if part[0].weight is None else torch.tensor([float(cell.weight or 0) for cell in part]),
            sampler,
            hook,
        ).cpu()
        for part in _parts(wanted, batch_size)
    ]
    return torch.cat(parts).float().clamp(-1, 1)


def _parts(wanted: Sequence[Cell], size: int) -> list[Sequence[Cell]]:
    return [wanted[k : k + size] for k in range(0, len(wanted), size)]
