"""Progress that can be read in a terminal and in a log file."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

SHOWN = ("train/loss", "val/loss", "val/clip_score", "lr", "epoch_seconds")


class ProgressLines(ProgressBar):
    """A line per epoch, and one in between when an epoch takes long: no bar, no control characters.

    It says how far the run is, against `max_steps` where they are set, and about how long the rest takes.

    Args:
        every_seconds: time between two lines within an epoch.
    """

    def __init__(self, every_seconds: float = 60.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self._enabled = True
        self._last = self._began = 0.0
        self._done_before = 0.0

    def enable(self) -> None:  # noqa: D102
        self._enabled = True

    def disable(self) -> None:  # noqa: D102
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._last = self._began = time.monotonic()
        self._done_before = _done(trainer, 0.0)

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._last > self.every_seconds:
            # Not `total_train_batches`: under max_steps that is what is left of them.
            batches = trainer.num_training_batches
            self._line(trainer, (batch_idx + 1) / batches, f"batch {batch_idx + 1:,}/{batches:,}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._line(trainer, 1.0, "" if trainer.max_steps > 0 else f"step {trainer.global_step:,}")

    def print(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        if self._enabled:
            print(*args, **{"flush": True, **kwargs})

    def _line(self, trainer: Trainer, share: float, where: str) -> None:
        self._last = time.monotonic()
        steps = f"step {trainer.global_step:,}/{trainer.max_steps:,}" if trainer.max_steps > 0 else ""
        epochs = f"/{_epochs(trainer):,}" if _epochs(trainer) else ""
        metrics = trainer.callback_metrics
        values = [f"{name} {float(metrics[name]):.4g}" for name in SHOWN if name in metrics]
        done, left = _done(trainer, share), ""
        if self._done_before < done < 1:
            seconds = (self._last - self._began) * (1 - done) / (done - self._done_before)
            left = f"about {duration(seconds)} left"
        parts = [steps, f"epoch {trainer.current_epoch + 1:,}{epochs}", where, *values, left]
        self.print("  ".join(filter(None, parts)))


class StepsBar(RichProgressBar):
    """Lightning's bar, which has no words for a run that only `max_steps` ends: it says `Epoch 7/-2`."""

    def _get_train_description(self, current_epoch: int) -> str:
        if _epochs(self.trainer) or self.trainer.max_steps <= 0:
            return super()._get_train_description(current_epoch)
        return f"Epoch {current_epoch}, from step {self.trainer.global_step:,}/{self.trainer.max_steps:,}"


def _epochs(trainer: Trainer) -> int:
    """After how many the run ends, 0 where they are not counted."""
    return max(trainer.max_epochs or 0, 0)


def _done(trainer: Trainer, share: float) -> float:
    """How much of the run is over, in [0, 1], when `share` of the epoch is; 0 where the run has no limit."""
    steps = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    epochs = (trainer.current_epoch + share) / _epochs(trainer) if _epochs(trainer) else 0.0
    return max(steps, epochs)


def duration(seconds: float) -> str:
    """A time in its natural unit: `40 s`, `3 min`, `2.5 h`."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def progress(every_seconds: float = 60.0) -> ProgressBar:
    """A bar in a terminal, lines elsewhere.

    Args:
        every_seconds: time between two lines within an epoch.
    """
    return StepsBar(leave=True) if sys.stdout.isatty() else ProgressLines(every_seconds)
