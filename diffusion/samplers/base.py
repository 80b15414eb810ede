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


class Step(NamedTuple):
    """What a hook is shown after each step.

    Attributes:
        number: 0 for the step that starts at t = 1.
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


class Sampler(ABC):
    """Walks from x_1, pure noise, to x_0.

    Args:
        steps: number of steps; None takes every step of the schedule.
        clip: clamp the expected x_0 to [-1, 1] in every step; right for images, wrong for latents.

    Raises:
        AntherError: fewer than 1 step.
    """

    def __init__(self, steps: int | None = None, clip: bool = False) -> None:
        if steps is not None and steps < 1:
            raise AntherError(f"a sampler takes 1 step or more, not {steps}: set sampler.steps.")
        self.steps = steps
        self.clip = clip

    def times(self, T: int) -> Tensor:
        """Trailing spacing: steps + 1 falling times from 1 to 0, float64, on the grid k / T where it is fine enough.

        Trailing starts at t = 1, where training ended, whatever the number of steps (Lin et al., 2024, arXiv
        2305.08891).
        """
        n = self.steps or T
        # Multiplied before it is divided: halves stay halves, and all machines round them alike.
        entries = torch.arange(n, -1, -1, dtype=torch.float64) * T / n
        return (entries.round() if n <= T else entries) / T

    @abstractmethod
    def step(self, denoiser: "Conditioned", x_t: Tensor, t: Tensor, s: Tensor, rng: ImageRNG) -> tuple[Tensor, Tensor]:
        """Goes from time t to time s.

        Args:
            denoiser: (x_t, t) -> E[x_0 | x_t]; call it as often as the solver needs.
            x_t: image at time t, (B, C, H, W).
            t: time, float64 scalar.
            s: next time, 0 <= s < t.
            rng: noise, one stream per image.

        Returns:
            x_s and the x_0 expected from x_t, both (B, C, H, W).
        """

    @torch.no_grad()
    def __call__(
        self, denoiser: Predictor, x_1: Tensor, rng: ImageRNG, cond: Tensor | None = None, hook: Hook | None = None
    ) -> Tensor:
        """Draws images.

        Args:
            denoiser: E[x_0 | x_t], guided or not.
            x_1: pure noise, (B, C, H, W).
            rng: noise for the steps, one stream per image.
            cond: conditions, (B, D).
            hook: called after each step, e.g. to record x_t and the expected x_0.

        Returns:
            x_0, (B, C, H, W); not clamped unless `clip` is set.
        """
        times = self.times(denoiser.schedule.T).to(x_1.device)
        conditioned = Conditioned(denoiser, cond, self.clip)
        x_t = x_1
        for index, (t, s) in enumerate(pairwise(times)):
            x_s, x_0 = self.step(conditioned, x_t, t, s, rng)
            if hook is not None:
                hook(Step(index, len(times) - 1, t.item(), s.item(), x_t, x_0, x_s))
            x_t = x_s
        return x_t


class Conditioned:
    """A denoiser with its condition bound, so that solvers handle images and times alone."""

    def __init__(self, denoiser: Predictor, cond: Tensor | None, clip: bool) -> None:
        self.schedule = denoiser.schedule
        self._denoiser = denoiser
        self._cond = cond
        self._clip = clip

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t] at one time t for all images."""
        x_0 = self._denoiser(x_t, t.expand(len(x_t)), self._cond)
        return x_0.clamp(-1, 1) if self._clip else x_0
