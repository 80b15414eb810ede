"""Denoisers made of denoisers: samplers do not know that they are guided."""

import torch
from torch import Tensor

from diffusion.denoiser import Denoiser


class ClassifierFree:
    """Classifier-free guidance in the weight w: e = (1 + w) e_c - w e_u (Ho and Salimans, 2022, arXiv 2207.12598).

    w = 0 is the conditional model, w = -1 the unconditional one; the scale s of other projects is 1 + w. The rule is
    applied to x_0, which is the same thing: x_0 is affine in every target, and the factors sum to one.

    Args:
        denoiser: a denoiser whose condition was dropped in training.
        null: the condition that means "none", (D,), owned by the conditioner.
        weight: w, one for all images or one per image (B,).
    """

    def __init__(self, denoiser: Denoiser, null: Tensor, weight: float | Tensor) -> None:
        self.schedule = denoiser.schedule
        self._denoiser = denoiser
        self._null = null
        self._weight = weight

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """Guided E[x_0 | x_t] for x_t (B, C, H, W), t (B,), cond (B, D)."""
        if cond is None:
            raise ValueError("guidance needs a condition; sample the denoiser itself without one")
        w = torch.as_tensor(self._weight, dtype=x_t.dtype, device=x_t.device)
        null = self._null.to(cond).expand_as(cond)
        # At these two weights one branch has the factor zero, so half of the work would be thrown away.
        if bool((w == 0).all()):
            only_cond: Tensor = self._denoiser(x_t, t, cond)
            return only_cond
        if bool((w == -1).all()):
            only_null: Tensor = self._denoiser(x_t, t, null)
            return only_null
        with_cond, without = self._denoiser.branches(x_t, t, (cond, null))
        w = w.view(-1, 1, 1, 1)
        return (1 + w) * with_cond - w * without
