"""How the learning rate moves: each function returns what Lightning calls an `lr_scheduler` config."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from diffusion.build import rebuild
from diffusion.errors import AntherError

MONITOR = "val/loss"

MakeScheduler = Callable[[Optimizer, int | None], dict[str, Any]]
"""What makes the schedule of an optimizer, of the run's steps; None where their number is not known."""


def plateau(
    optimizer: Optimizer, total_steps: int | None, factor: float, patience: int, min_lr: float
) -> dict[str, Any]:
    """Multiplies the rate by `factor` when the validation loss has not fallen for `patience` epochs.

    Args:
        optimizer: whose rate moves.
        total_steps: not used here.
        factor: in (0, 1).
        patience: epochs; those without a validation do not count.
        min_lr: the floor.
    """
    scheduler = ReduceLROnPlateau(optimizer, factor=factor, patience=patience, min_lr=min_lr)
    return {"scheduler": scheduler, "monitor": MONITOR, "interval": "epoch", "strict": False}


def warmup_cosine(
    optimizer: Optimizer, total_steps: int | None, warmup_steps: int, final: float = 0.0
) -> dict[str, Any]:
    """Rises linearly over `warmup_steps`, then falls along half a cosine to `final` times the rate.

    Args:
        optimizer: whose rate moves.
        total_steps: optimizer steps of the whole run; None where nobody knows.
        warmup_steps: optimizer steps.
        final: share of the rate at the end, in [0, 1].

    Raises:
        AntherError: one of them out of its range, or a run whose steps nobody knows.
    """
    if total_steps is None:
        raise AntherError(
            "scheduler=warmup_cosine falls until the last step, and neither trainer.max_steps nor trainer.max_epochs "
            "says which that is: give one of them, or scheduler=plateau."
        )
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


def retune(checkpoint: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Puts what a config changes in the optimizer into a checkpoint, which would otherwise bring back its own.

    The schedule goes on from where it was, at the new rate; another schedule, or a plateau with other settings, begins
    anew. Where nothing was changed, the checkpoint stays as it is.

    Args:
        checkpoint: of train.py; its states of the optimizer and of the schedule are changed in place.
        config: of the run that goes on.
    """
    modules = checkpoint["config"]["module"], config["module"]
    there, here = (module.get("scheduler") or {} for module in modules)
    # A plateau brings its settings back with its state; what moves by steps brings its place alone.
    moved = there.get("_target_") == here.get("_target_") and all("base_lrs" in s for s in checkpoint["lr_schedulers"])
    anew = there != here and not moved
    nodes = [module.get("optimizer") for module in modules]
    if nodes[0] is None or (nodes[0] == nodes[1] and not anew):  # None: of before there was a choice
        return
    parameter = torch.nn.Parameter(torch.zeros(1))
    old, new = (rebuild(node, "optimizer")([parameter]).defaults for node in nodes)
    changed = {key: value for key, value in new.items() if old.get(key) != value}
    rate = changed.pop("lr", new["lr"] if anew else None)
    for group in (group for state in checkpoint["optimizer_states"] for group in state["param_groups"]):
        # A group that has a value of its own, such as no weight decay, keeps it.
        group.update({key: value for key, value in changed.items() if group.get(key) == old.get(key)})
        if rate is not None:
            group["lr"] = rate * (group["lr"] / old["lr"] if old["lr"] and not anew else 1.0)
            group |= {"initial_lr": rate} if "initial_lr" in group else {}
    if anew:
        checkpoint["lr_schedulers"] = []
    for schedule in checkpoint["lr_schedulers"]:
        if rate is not None and "base_lrs" in schedule:
            schedule["base_lrs"] = [rate] * len(schedule["base_lrs"])
