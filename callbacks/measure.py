"""When a callback acts that does so every few epochs, and what those share that measure."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn


def due(trainer: Trainer, every_n_epochs: int) -> bool:
    """Whether the running validation is the first one after n more epochs.

    Where each epoch is validated, that is at the end of each n-th. A validation after the fit, for the objective alone,
    is none.
    """
    if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
        return False
    between = trainer.check_val_every_n_epoch
    if between is None:  # every so many batches, counted over epochs
        batches, period = trainer.fit_loop.total_batch_idx + 1, every_n_epochs * trainer.num_training_batches
        return batches // period > (batches - (trainer.val_check_batch or 0)) // period
    epochs = trainer.current_epoch + 1
    return epochs // every_n_epochs > (epochs - between) // every_n_epochs


class Measure(Callback, ABC):
    """A measure of the model that is taken every few epochs and, where it is the run's objective, at its end.

    Args:
        name: what the names of its metrics begin with.
        every_n_epochs: how often.

    Attributes:
        taken_at: optimizer steps before this process took it last.
    """

    def __init__(self, name: str, every_n_epochs: int) -> None:
        self.name, self.every_n_epochs = name, every_n_epochs
        self.taken_at = -1

    def gives(self, metric: str) -> bool:
        """Whether a metric is one of its own."""
        return metric.startswith(self.name)

    @abstractmethod
    def take(self, trainer: Trainer, module: LightningModule) -> None:
        """Measures and logs."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        config: dict[str, Any] = getattr(pl_module, "config", {})
        asked = trainer.state.fn == TrainerFn.VALIDATING and self.gives(config.get("objective", ""))
        if asked or due(trainer, self.every_n_epochs):
            self.take(trainer, pl_module)
            self.taken_at = trainer.global_step
