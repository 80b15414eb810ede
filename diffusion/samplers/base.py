"""From noise to image: times, the loop, and the hook. What a step does is the sampler's own."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.denoiser import Predictor
from diffusion.errors import AntherError
from diffusion.rng import ImageRNG
from diffusion.samplers.grids import GRIDS, beginning_at
from diffusion.schedules import Schedule


class Step(NamedTuple):
    """What a hook is shown after each step.

    Attributes:
        number: 0 for the first step.
        steps: how many there are.
        t: time before the step.
        s: time after it, s < t.
        x_t: image before the step, (B, C, H, W).
        x_0: the clean image expected from x_t.
        x_s: image after the step.
    """

    number: int
    steps: int
    t: float
    s: float
    x_t: Tensor
    x_0: Tensor
    x_s: Tensor


Hook = Callable[[Step], None]
Project = Callable[[Tensor, Tensor], Tensor]
"""(x_s, s) -> x_s: what each step's image is held to."""


class Sampler(ABC):
    """Walks from x_1, pure noise, to x_0, or from an image on the way.

    Args:
        steps: number of steps; None takes every step of the schedule.
        clip: keep the expected x_0 in [-1, 1] in every step; right for images, wrong for latents. True clamps it. A
            share p, such as 0.995, is dynamic thresholding (Saharia et al., 2022, arXiv 2205.11487, section 2.3): an
            image is clamped to [-s, s] and divided by s, the p-quantile of its |x_0| or 1, whichever is larger, which
            keeps colours from saturating under strong guidance.
        grid: where the steps lie: trailing, logsnr or karras, see `samplers.grids`.

    Raises:
        AntherError: fewer than 1 step, a share that is none, or an unknown grid.
    """

    def __init__(self, steps: int | None = None, clip: bool | float = False, grid: str = "trailing") -> None:
        if steps is not None and steps < 1:
            raise AntherError(f"a sampler takes 1 step or more, not {steps}: set sampler.steps.")
        if not isinstance(clip, bool) and not 0 < clip < 1:
            raise AntherError(
                f"sampler.clip = {clip} is neither true nor false nor a share of an image's values, between 0 and 1: "
                "give one such as 0.995 for dynamic thresholding."
            )
        if grid not in GRIDS:
            raise AntherError(f"unknown grid {grid!r}: set sampler.grid to one of {', '.join(GRIDS)}.")
        self.steps = steps
        self.clip = clip
        self.grid = grid

    def times(self, schedule: Schedule) -> Tensor:
        """The n + 1 times of a walk of n steps, falling from 1 to 0, float64."""
        return GRIDS[self.grid](schedule, self.steps or schedule.T)

    @abstractmethod
    def step(
        self, denoiser: "Conditioned", x_t: Tensor, t: Tensor, s: Tensor, rng: ImageRNG, before: Step | None
    ) -> tuple[Tensor, Tensor]:
        """Goes from time t to time s.

        Args:
            denoiser: (x_t, t) -> E[x_0 | x_t]; call it as often as the solver needs.
            x_t: image at time t, (B, C, H, W).
            t: time, float64 scalar on the host, as are all levels: no step waits for the device to read them.
            s: next time, 0 <= s < t.
            rng: noise, one stream per image.
            before: the step that led here, for solvers with a memory; None at the start. A sampler itself remembers
                nothing, so one may be used for several walks at a time.

        Returns:
            x_s and the x_0 expected from x_t, both (B, C, H, W).
        """

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Predictor,
        x_1: Tensor,
        rng: ImageRNG,
        cond: Tensor | None = None,
        hook: Hook | None = None,
        start: float = 1.0,
        project: Project | None = None,
    ) -> Tensor:
        """Draws images.

        Args:
            denoiser: E[x_0 | x_t], guided or not.
            x_1: pure noise, (B, C, H, W), or the image at time `start`.
            rng: noise for the steps, one stream per image.
            cond: conditions, (B, D).
            hook: called after each step, e.g. to record x_t and the expected x_0.
            start: time at which the walk begins, in [0, 1]; of its times it takes those after it.
            project: takes the place of each x_s, e.g. to hold a part of the image fixed.

        Returns:
            x_0, (B, C, H, W); not clamped unless `clip` is set.
        """
        times = beginning_at(self.times(denoiser.schedule), start)
        conditioned = Conditioned(denoiser, cond, self.clip)
        x_t, before = x_1, None
        for index, (t, s) in enumerate(pairwise(times)):
            x_s, x_0 = self.step(conditioned, x_t, t, s, rng, before)
            if project is not None:
                x_s = project(x_s, s)
            before = Step(index, len(times) - 1, t.item(), s.item(), x_t, x_0, x_s)
            if hook is not None:
                hook(before)
            x_t = x_s
        return x_t


class Conditioned:
    """A denoiser with its condition bound, so that solvers handle images and times alone."""

    def __init__(self, denoiser: Predictor, cond: Tensor | None, clip: bool | float) -> None:
        self.schedule = denoiser.schedule
        self._denoiser = denoiser
        self._cond = cond
        self._clip = clip

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t] at one time t for all images."""
        x_0 = self._denoiser(x_t, t.expand(len(x_t)), self._cond)
        if isinstance(self._clip, bool):
            return x_0.clamp(-1, 1) if self._clip else x_0
        # Image by image: torch's quantile has a limit of 2^24 values.
        largest = [image.abs().flatten().quantile(self._clip).clamp(min=1) for image in x_0]
        s = torch.stack(largest).view(-1, 1, 1, 1)
        return x_0.clamp(-s, s) / s
