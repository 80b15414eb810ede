"""When a callback acts that does so every few epochs, and what those share that measure."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn


def due(trainer: Trainer, every_n_epochs: int) -> bool:
    """Whether the running validation ends an n-th epoch; one after the fit, for the objective alone, ends none."""
    fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
    return fitting and (trainer.current_epoch + 1) % every_n_epochs == 0


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
