"""How the learning rate moves: each function returns what Lightning calls an `lr_scheduler` config."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from diffusion.errors import AntherError


def plateau(optimizer: Optimizer, total_steps: int, factor: float, patience: int, min_lr: float) -> dict[str, Any]:
    """Multiplies the rate by `factor` when the validation loss has not fallen for `patience` epochs.

    Args:
        optimizer: whose rate moves.
        total_steps: not used here.
        factor: in (0, 1).
        patience: epochs.
        min_lr: the floor.
    """
    scheduler = ReduceLROnPlateau(optimizer, factor=factor, patience=patience, min_lr=min_lr)
    return {"scheduler": scheduler, "monitor": "val/loss", "interval": "epoch", "strict": False}


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup_steps: int, final: float = 0.0) -> dict[str, Any]:
    """Rises linearly over `warmup_steps`, then falls along half a cosine to `final` times the rate.

    Args:
        optimizer: whose rate moves.
        total_steps: optimizer steps of the whole run.
        warmup_steps: optimizer steps.
        final: share of the rate at the end, in [0, 1].

    Raises:
        AntherError: one of them out of its range.
    """
    if warmup_steps < 0:
        raise AntherError(f"scheduler.warmup_steps = {warmup_steps} counts steps: give 0 or more.")
    if not 0 <= final <= 1:
        raise AntherError(f"scheduler.final = {final} is a share of the rate: choose it in [0, 1].")

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    return {"scheduler": LambdaLR(optimizer, share), "interval": "step"}
