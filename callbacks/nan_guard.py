"""Training stops at the first loss that is no number, with weights and checkpoint still good."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor
from torch.optim import Optimizer

from diffusion.errors import AntherError


class NonFiniteError(AntherError):
    """The loss or its gradient is nan or infinite; nothing of that step may be saved."""


class NanGuard(Callback):
    """Looks at the loss before `backward` and at the gradient before the optimizer uses it.

    A finite loss with an infinite gradient would spoil the weights one step before the loss shows it, and a checkpoint
    may be written in between. Under fp16 infinite gradients are the loss scaler's business and are left to it.
    """

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Checks the loss.

        Raises:
            NonFiniteError: on all ranks if it is not finite on one.
        """
        self._require(trainer, bool(loss.isfinite().all()), "loss")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Checks the gradient, likewise."""
        if trainer.precision == "16-mixed":
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._require(trainer, bool(torch.nn.utils.get_total_norm(gradients).isfinite()), "gradient")

    @staticmethod
    def _require(trainer: Trainer, finite: bool, what: str) -> None:
        # If one rank left alone, the others would wait for it in their next collective operation.
        if trainer.world_size > 1:
            finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
        if not finite:
            raise NonFiniteError(
                f"the {what} is not finite at step {trainer.global_step} (epoch {trainer.current_epoch}), so training "
                f"stopped before the weights took it in; {_kept(trainer)}lower optimizer.lr, clip gradients or "
                "use trainer.precision=32-true."
            )


def _kept(trainer: Trainer) -> str:
    paths = (getattr(c, "last_path", None) for c in trainer.callbacks if isinstance(c, Checkpoint))  # type: ignore[attr-defined]
    path = next((p for p in paths if p and p.exists()), None)
    return f"the last good checkpoint is {path}: " if path else "no checkpoint was written yet: "
