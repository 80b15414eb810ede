"""What all modules share: a run's length, what their layers draw, and what they know of their validation."""

import math
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from diffusion.modules.learning_rate import MONITOR
from diffusion.rng import LAYERS, generator

UNSEEN = "unseen_val_loss"
"""In a checkpoint: the loss of a validation within the running epoch, which no plateau scheduler has seen yet."""


class Module(lightning.LightningModule):
    """A LightningModule that goes on after an interruption as if there had been none.

    Its layers draw the same in every process. It knows when it was validated, and its plateau scheduler sees each loss
    once: Lightning shows it the last value after every epoch, however old, and in a resumed process none, so that it
    would lose patience over epochs that were not validated, and not the same after an interruption.

    Args:
        seed: of everything that is drawn in training.

    Attributes:
        validated_at: optimizer steps at the end of the last validation in this process.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.validated_at = -1
        self._unseen: float | None = None
        # Samples in the first batch of the optimizer's step, in the running one, and in all of them so far.
        self._first = self._running = self._seen = 0

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None where neither steps nor epochs are limited."""
        steps = self.trainer.estimated_stepping_batches
        return None if math.isinf(steps) else int(steps)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds what layers draw from in training, as dropout does, which takes no generator of its own.

        Their draws are then a function of (seed, step, batch within the step, rank): the same in a process that goes on
        from a checkpoint; others on other numbers of devices, or where batches are accumulated.
        """
        part = batch_idx % self.trainer.accumulate_grad_batches
        self._running = len(batch["image"])
        if part == 0 or not self._first:  # a run may go on within a step, after a fault
            self._first = self._seen = self._running
        else:
            self._seen += self._running
        torch.manual_seed(generator(LAYERS, self.seed, self.global_step, part, self.global_rank).initial_seed())

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Counts a smaller batch, which may end an epoch, by its samples among those that are accumulated.

        Lightning divides the loss of each batch, a mean, by the number of batches that are to be accumulated.
        """
        super().backward(loss * (self._running / self._first), *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Makes the gradient that of a mean over all samples of the step, where an epoch ended within it."""
        whole = self.trainer.accumulate_grad_batches * self._first
        if self._seen != whole:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(whole / self._seen)

    def on_validation_end(self) -> None:
        """Notes which weights the validation loss belongs to, and that there is something new to see."""
        self.validated_at = self.global_step
        if not self.trainer.sanity_checking and MONITOR in self.trainer.callback_metrics:
            self._unseen = float(self.trainer.callback_metrics[MONITOR])

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Leaves a plateau scheduler alone after an epoch without a validation."""
        if isinstance(scheduler, ReduceLROnPlateau):
            if self._unseen is None:
                return
            self._unseen = None
        super().lr_scheduler_step(scheduler, metric)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # noqa: D102
        if self._unseen is not None:
            checkpoint[UNSEEN] = self._unseen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # noqa: D102
        self._unseen = checkpoint.get(UNSEEN)

    def on_train_start(self) -> None:
        """Puts the loss where Lightning looks for it: an earlier process took it in this epoch."""
        if self._unseen is not None:
            self.trainer.callback_metrics[MONITOR] = torch.tensor(self._unseen)
