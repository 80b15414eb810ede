"""Progress that can be read in a terminal and in a log file."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

SHOWN = ("train/loss", "val/loss", "val/clip_score", "lr", "epoch_seconds")


class ProgressLines(ProgressBar):
    """A line per epoch, and one in between when an epoch takes long: no bar, no control characters.

    Args:
        every_seconds: time between two lines within an epoch.
    """

    def __init__(self, every_seconds: float = 60.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self._enabled = True
        self._last = 0.0

    def enable(self) -> None:  # noqa: D102
        self._enabled = True

    def disable(self) -> None:  # noqa: D102
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._last = time.monotonic()

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._last > self.every_seconds:
            self._line(trainer, f"batch {batch_idx + 1}/{self.total_train_batches}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._line(trainer, f"step {trainer.global_step}")

    def print(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        if self._enabled:
            print(*args, **{"flush": True, **kwargs})

    def _line(self, trainer: Trainer, where: str) -> None:
        self._last = time.monotonic()
        metrics = trainer.callback_metrics
        values = "  ".join(f"{name} {float(metrics[name]):.4g}" for name in SHOWN if name in metrics)
        epochs = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else "?"
        self.print(f"epoch {trainer.current_epoch + 1}/{epochs}  {where}  {values}")


def progress(every_seconds: float = 60.0) -> ProgressBar:
    """A bar in a terminal, lines elsewhere.

    Args:
        every_seconds: time between two lines within an epoch.
    """
    return RichProgressBar(leave=True) if sys.stdout.isatty() else ProgressLines(every_seconds)
