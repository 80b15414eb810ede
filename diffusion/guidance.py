"""Denoisers made of denoisers: samplers do not know that they are guided."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion.denoiser import Denoiser, Predictor
from diffusion.devices import upload
from diffusion.errors import AntherError
from diffusion.schedules import Schedule


@dataclass(frozen=True)
class Guidance:
    """All about guidance but its weight, which may differ from image to image.

    Attributes:
        interval: (low, high), the noise levels low < sigma_t / alpha_t <= high at which guidance acts; elsewhere the
            model is the conditional one and costs half as much (Kynkäänniemi et al., 2024, arXiv 2404.07724, whose
            sigma is this level). None is everywhere.
        rescale: phi in [0, 1], how far each guided x_0 is brought back to the standard deviation of the conditional
            one (Lin et al., 2024, arXiv 2305.08891, section 3.4).
        bad: a worse model of the same data; guidance then leads away from it, and not from the model without its
            condition (see `AutoGuidance`).
        negative: a prompt; guidance then leads away from the model under it, and not from the model without its
            condition: e = (1 + w) e_c - w e_n.

    Raises:
        AntherError: no interval, phi outside [0, 1], a prompt without a word, or both a worse model and a prompt.
    """

    interval: Sequence[float] | None = None
    rescale: float = 0.0
    bad: Predictor | None = None
    negative: str | None = None

    def __post_init__(self) -> None:
        if self.interval is not None and not _is_interval(self.interval):
            raise AntherError(
                f"guidance.interval = {self.interval} is no pair of noise levels sigma / alpha, 0 <= low < high: give "
                "one such as [0.3,5], or [0,inf] for everywhere."
            )
        if not 0 <= self.rescale <= 1:
            raise AntherError(f"guidance.rescale lies in [0, 1], not at {self.rescale}: 0 leaves guidance as it is.")
        if self.negative is not None and not self.negative.strip():
            raise AntherError("guidance.negative holds no word: name what is not wanted, or leave it out.")
        if self.negative is not None and self.bad is not None:
            raise AntherError(
                "guidance.negative and guidance.bad both say what to lead away from: leave one of them out."
            )

    def record(self) -> dict[str, Any]:
        """The interval, phi and the negative prompt as plain values for JSON; None where they change nothing."""
        everywhere = self.interval is None or tuple(self.interval) == (0, math.inf)
        interval = None if everywhere else [float(level) for level in self.interval or ()]
        return {
            "guidance_interval": interval,
            "guidance_rescale": self.rescale or None,
            "guidance_negative": self.negative,
        }

    def describe(self) -> str:
        """What follows the weight in a sentence; nothing where there is nothing to say."""
        told = self.record()
        words = ""
        if told["guidance_interval"]:
            words += " where {:g} < sigma / alpha <= {:g}".format(*told["guidance_interval"])
        if told["guidance_rescale"]:
            words += f", rescaled by phi = {self.rescale:g}"
        if self.negative is not None:
            words += f", away from {self.negative!r}"
        return words + (", away from a worse model" if self.bad is not None else "")


def _is_interval(levels: Sequence[float]) -> bool:
    pair = not isinstance(levels, str) and len(levels) == 2 and all(isinstance(x, int | float) for x in levels)
    return pair and 0 <= levels[0] < levels[1]


class ClassifierFree:
    """Classifier-free guidance in the weight w: e = (1 + w) e_c - w e_u (Ho and Salimans, 2022, arXiv 2207.12598).

    w = 0 is the conditional model, w = -1 the unconditional one; the scale s of other projects is 1 + w. The rule is
    applied to x_0, which is the same thing: x_0 is affine in every target, and the factors sum to one.

    Args:
        denoiser: a denoiser whose condition was dropped in training.
        null: the condition that means "none", (D,), owned by the conditioner; or that of a negative prompt.
        weight: w, one for all images or one per image (B,).
        guidance: where it acts, and how far x_0 is rescaled; its `bad` has no part in this.
    """

    def __init__(
        self, denoiser: Denoiser, null: Tensor, weight: float | Tensor, guidance: Guidance | None = None
    ) -> None:
        self.schedule = denoiser.schedule
        self._denoiser = denoiser
        self._null = null
        self._weight = weight
        self._guidance = guidance or Guidance()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """Guided E[x_0 | x_t] for x_t (B, C, H, W), t (B,), cond (B, D)."""
        if cond is None:
            raise ValueError("guidance needs a condition; sample the denoiser itself without one")
        w = _weights(self._weight, self._guidance, self.schedule, x_t, t)
        self._null = upload(self._null, cond.device, cond.dtype)
        null = self._null.expand_as(cond)
        # At these two weights one branch has the factor zero, so half of the work would be thrown away.
        if bool((w == 0).all()):
            only_cond: Tensor = self._denoiser(x_t, t, cond)
            return only_cond
        if bool((w == -1).all()) and self._guidance.rescale == 0:
            only_null: Tensor = self._denoiser(x_t, t, null)
            return only_null
        with_cond, without = self._denoiser.branches(x_t, t, (cond, null))
        return _lead(with_cond, without, w, self._guidance.rescale)


class AutoGuidance:
    """A model led away from a worse version of itself: x_0 = (1 + w) x_main - w x_bad.

    Reference: Karras et al., 2024, arXiv 2406.02507.

    Both see the same condition, so w raises the quality of the images and not their agreement with the condition at
    the price of variety; models without a condition can be guided as well. An earlier checkpoint, or a smaller network
    trained on the same data, serves as the bad one. w = 0 is the main model alone.

    Args:
        denoiser: the main model.
        bad: the worse one, with the same schedule and the same conditions.
        weight: w, one for all images or one per image (B,).
        guidance: where it acts, and how far x_0 is rescaled.
    """

    def __init__(
        self, denoiser: Predictor, bad: Predictor, weight: float | Tensor, guidance: Guidance | None = None
    ) -> None:
        self.schedule = denoiser.schedule
        self._denoiser = denoiser
        self._bad = bad
        self._weight = weight
        self._guidance = guidance or Guidance()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """Guided E[x_0 | x_t] for x_t (B, C, H, W), t (B,), cond (B, D) or None."""
        w = _weights(self._weight, self._guidance, self.schedule, x_t, t)
        main = self._denoiser(x_t, t, cond)
        if bool((w == 0).all()):
            return main
        return _lead(main, self._bad(x_t, t, cond), w, self._guidance.rescale)


def _weights(weight: float | Tensor, guidance: Guidance, schedule: Schedule, x_t: Tensor, t: Tensor) -> Tensor:
    """The weights at these times, of one element or (B,), where the times are: 0 outside the interval."""
    w = torch.as_tensor(weight, dtype=x_t.dtype, device=t.device)
    if guidance.interval is None:
        return w
    low, high = guidance.interval
    alpha, sigma = schedule(t)
    level = sigma / alpha
    return torch.where((low < level) & (level <= high), w, torch.zeros_like(w))


def _lead(towards: Tensor, away: Tensor, w: Tensor, rescale: float) -> Tensor:
    """(1 + w) towards - w away, brought back to the deviation of `towards` by the share `rescale`.

    Lin et al. rescale the network's output. Here it is x_0, whose deviation is what guidance inflates and what shows
    as over-exposure, so that one phi means the same for every target; for target=x0, and for target=v where there is
    no signal, it is the same thing.
    """
    w = upload(w, towards.device).view(-1, 1, 1, 1)
    guided = (1 + w) * towards - w * away
    if rescale == 0:
        return guided
    deviation = guided.std((1, 2, 3), keepdim=True)
    # An image of one colour has no deviation to bring back.
    ratio = torch.where(deviation > 0, towards.std((1, 2, 3), keepdim=True) / deviation, 1)
    return rescale * ratio * guided + (1 - rescale) * guided
