"""The checkpoints of a run: last.ckpt, from which it goes on, and the best by some measure."""

import logging
import signal
import time
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.nan_guard import NonFiniteError

log = logging.getLogger(__name__)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` for a measure that is not taken in every validation.

    Without a value there is nothing to save; Lightning stops the run instead. A value of an earlier epoch that still
    lies among the metrics is never better than itself, so it saves nothing either.

    Args:
        **options: of `ModelCheckpoint`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(save_on_train_epoch_end=False, **options)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` so that the same command goes on from it as if it had never stopped.

    It is written when an epoch is over, schedulers included; every `every_n_steps` optimizer steps; at the end of the
    fit; and when the run is broken off. Saves between the first and the last are left out while they would take more
    than `share` of the time, so a kill costs little work and large networks with short epochs do not train slower.

    Ctrl-C is answered after the running optimizer step, where the run can go on exactly; a second one at once. What a
    step with a loss that is no number leaves behind is never saved.

    Args:
        dirpath: folder of the checkpoint.
        every_n_steps: also within epochs.
        share: of the training time, in (0, 1], that saving may take.
    """

    def __init__(self, dirpath: str | Path, every_n_steps: int = 500, share: float = 0.05) -> None:
        self.last_path = Path(dirpath) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self.share = share
        self._not_before = 0.0
        self._step_before = 0  # optimizer steps when the running batch began
        self._loader_state: dict[str, Any] | None = None
        self._interrupted = False
        self._old_handler: Any = None

    # When to save ---------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the epoch before this one: only now the plateau scheduler has seen its validation loss."""
        if trainer.current_epoch > 0:
            self._save_if_due(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:  # noqa: D102
        self._step_before = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # noqa: D102
        if trainer.global_step == self._step_before:
            return
        if self._interrupted:
            raise KeyboardInterrupt
        if trainer.global_step % self.every_n_steps == 0:
            self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves what there is, if it is good and all processes are here."""
        alone = trainer.world_size > 1 and not isinstance(exception, KeyboardInterrupt)
        training = trainer.state.fn == TrainerFn.FITTING and trainer.global_step > 0
        # Lightning does not tear callbacks down after an error.
        self._release()
        if isinstance(exception, NonFiniteError) or alone or not training:
            return
        try:
            self._save(trainer)
        except Exception as error:
            # The first fault is the one to report.
            log.warning("no checkpoint could be written: %s", error)
            return
        log.warning("stopped at step %d; the same command goes on from %s", trainer.global_step, self.last_path)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._release()

    def _release(self) -> None:
        # When Ctrl-C ends the run, Lightning ignores further ones until it is over; that is left as it is.
        if signal.getsignal(signal.SIGINT) == self._on_interrupt:
            signal.signal(signal.SIGINT, self._old_handler)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        log.warning("stopping after this step; Ctrl-C again stops at once")

    # How to save ----------------------------------------------------------------------------------------------------

    def _save_if_due(self, trainer: Trainer) -> None:
        if trainer.strategy.broadcast(time.monotonic() >= self._not_before):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        start = time.monotonic()
        trainer.save_checkpoint(self.last_path, weights_only=False)
        now = time.monotonic()
        self._not_before = now + (now - start) * (1 / self.share - 1)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Mends what Lightning's loops do not know of themselves when they are saved at an unusual moment."""
        fit = checkpoint["loops"]["fit_loop"]
        epochs, batches = fit["epoch_progress"], fit["epoch_loop.batch_progress"]
        # A batch that broke off before the optimizer used it; the noise of a step depends on how many there were.
        if batches["total"]["ready"] > batches["total"]["processed"] and batches["current"]["processed"] == 0:
            fit["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # the resumed loop takes one empty turn
        _set(batches, "ready", batches["total"]["processed"] - batches["total"]["ready"])
        _set(batches, "started", batches["total"]["processed"] - batches["total"]["started"])
        # The loader counts batches handed out, and begins anew only with the first batch of the next epoch.
        between = epochs["total"]["ready"] > epochs["total"]["started"]
        for state in fit["state_dict"].get("combined_loader", []):
            state["batches"] = 0 if between else batches["current"]["processed"]
        # An epoch that was announced and did not begin: the state between two epochs is one that Lightning resumes.
        _set(epochs, "ready", epochs["total"]["started"] - epochs["total"]["ready"])
        trained = batches["current"]["processed"] >= trainer.num_training_batches
        unfinished = epochs["total"]["started"] > epochs["total"]["completed"]
        if batches["current"]["processed"] > 0 and not trained and not unfinished and not between:
            # max_steps ended the run within an epoch, which Lightning counts as over.
            _set(epochs, "processed", -1)
            _set(epochs, "completed", -1)
        if trainer.validating or (trained and unfinished):
            # The validation is taken again as a whole: Lightning would go on in its middle, or leave it out and with
            # it the plateau scheduler's step.
            _set(batches, "completed", batches["total"]["processed"] - batches["total"]["completed"])
            if epochs["total"]["processed"] > epochs["total"]["completed"]:
                fit["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
                _set(epochs, "processed", -1)
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            fit["epoch_loop.val_loop.batch_progress"] |= {"total": dict(begun), "current": dict(begun)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remembers where in its epoch the loader was."""
        states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        self._loader_state = states[0] if states else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the loader there, and waits for Ctrl-C.

        Lightning forgets the loader's state when a learning rate schedule asked for the number of steps.
        """
        loader: Any = trainer.train_dataloader
        if self._loader_state is not None:
            loader.load_state_dict(self._loader_state)
        self._loader_state = None
        # With several processes each would stop after another step and wait for the others for ever. Not earlier than
        # here: Lightning puts back the handlers that it found at the beginning of the fit.
        if trainer.world_size == 1 and current_thread() is main_thread():
            self._interrupted = False
            self._old_handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets a resumed epoch end like any other: while it counts as restarting, no plateau scheduler is asked."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            trainer.fit_loop.restarting = False


def _set(progress: dict[str, Any], name: str, change: int) -> None:
    for count in (progress["total"], progress["current"]):
        count[name] += change
