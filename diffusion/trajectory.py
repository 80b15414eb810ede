"""The way from noise to image, kept while a sampler walks it."""

import torch
from torch import Tensor

from diffusion.images import grid
from diffusion.samplers import Step


class Trajectory:
    """A sampler's hook that keeps the way from noise to image.

    Each frame shows x_t and beside it the clean image expected from it; the last frame shows the image twice.

    Args:
        frames: how many to keep at most, evenly spaced.
    """

    def __init__(self, frames: int = 40) -> None:
        self.frames = frames
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, step: Step) -> None:
        """Keeps the step if it is one of the wanted ones; batches drawn one after the other are joined."""
        if step.number % -(-step.steps // self.frames) == 0:
            self._kept.setdefault(step.number, []).append((step.x_t.cpu(), step.x_0.cpu()))
        if step.number == step.steps - 1:
            self._kept.setdefault(step.steps, []).append((step.x_s.cpu(), step.x_s.cpu()))

    def pictures(self, columns: int, scale: int = 1) -> list[Tensor]:
        """The frames, each (C, H, W) in [-1, 1], laid out like the grid of the images."""
        pictures = []
        for _, parts in sorted(self._kept.items()):
            noisy, clean = (torch.cat(side).float().clamp(-1, 1) for side in zip(*parts, strict=True))
            pictures.append(torch.cat([grid(noisy, columns, scale=scale), grid(clean, columns, scale=scale)], 2))
        return pictures
