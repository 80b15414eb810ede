"""The checkpoints of a run: last.ckpt, from which it goes on, and the best by some measure."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from callbacks.counts import check_counts
from callbacks.nan_guard import NonFiniteError
from callbacks.stopping import StopSignals
from diffusion.checkpoint import LAST, PREVIOUS
from diffusion.errors import AntherError, Stopped
from diffusion.files import keep_as
from diffusion.loggers import CSVLog

log = logging.getLogger(__name__)

MEANS = "epoch_means"
"""In a checkpoint: sum and weight of the running means of a training epoch, by name, a row per process."""


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

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lets a run whose folder was moved know its best where it lies now; Lightning would forget how good it was."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None or Path(str(trainer.ckpt_path)).resolve().parent != Path(str(self.dirpath)):
            return

        before = Path(state["dirpath"])

        def moved(path: str) -> str:
            # The best may still lie with the run that this one began from.
            return str(Path(str(self.dirpath), Path(path).name)) if Path(path).parent == before else path

        if not Path(moved(state["best_model_path"])).is_file():
            return  # the last checkpoint alone came here, and what it measures itself by did not
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[name] = moved(state[name])
        state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
        state["dirpath"] = self.dirpath


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` so that the same command goes on from it as if it had never stopped.

    It is written when an epoch is over, schedulers included; every `every_n_steps` optimizer steps; at the end of the
    fit; and when the run is broken off. Saves between the first and the last are left out while they would take more
    than `share` of the time, so a kill costs little work and large networks with short epochs do not train slower.
    The one before is kept as `previous.ckpt`.

    Ctrl-C, SIGTERM and SLURM's signal are answered after the running optimizer step, where the run can go on exactly;
    a second Ctrl-C at once. What a step with a loss that is no number leaves behind is never saved.

    The rows of a `CSVLog` and the running means of an epoch go with the checkpoint: a resumed run logs every step once,
    with the values that an uninterrupted one logs.

    Args:
        dirpath: folder of the checkpoint.
        every_n_steps: also within epochs.
        share: of the training time, in (0, 1], that saving may take.
    """

    def __init__(self, dirpath: str | Path, every_n_steps: int = 500, share: float = 0.05) -> None:
        check_counts("last", every_n_steps=every_n_steps)
        if not 0 < share <= 1:
            raise AntherError(f"callbacks.last.share = {share} is a share of the time: choose it in (0, 1].")
        self.last_path = Path(dirpath) / LAST
        self.every_n_steps = every_n_steps
        self.share = share
        self._not_before = 0.0
        self._step_before = 0  # optimizer steps when the running batch began
        self._stepped = False  # since the last look at what is due
        self._first_step = 0  # of this fit
        self._loader_state: dict[str, Any] | None = None
        self._signals = StopSignals()
        # Sum and weight of what Lightning averages over the training epoch: by name, of this process so far, and of
        # the part of the epoch that an earlier run trained.
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._earlier: dict[str, Tensor] = {}

    # When to save ---------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the epoch before this one: only now the plateau scheduler has seen its validation loss."""
        self._stepped = False
        self._signals.check(trainer)
        if trainer.current_epoch > 0:
            self._save_if_due(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:  # noqa: D102
        self._after_a_step(trainer)
        self._step_before = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # noqa: D102
        self._note_means(trainer)
        self._stepped |= trainer.global_step > self._step_before

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the epoch's means; an epoch of which a resumed run trained no batch gets them here.

        It is over like any other, too: a resumed run may have validated before it was interrupted.
        """
        _not_restarting(trainer)
        for name, sums in self._earlier.items():
            # In Lightning's own steps and precision, so that the result is the same to the bit.
            total, weight = trainer.strategy.reduce(sums.float().to(pl_module.device), reduce_op="mean")
            pl_module.log(name, total / weight)
        self._sums, self._earlier = {}, {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._save(trainer)
        self._signals.check(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves what there is, if it is good and all processes are here."""
        together = isinstance(exception, Stopped) and exception.together
        alone = trainer.world_size > 1 and not together
        training = trainer.state.fn == TrainerFn.FITTING and trainer.global_step > self._first_step
        training &= not _at_its_end(trainer)
        # Lightning does not tear callbacks down after an error.
        self._signals.release()
        if isinstance(exception, NonFiniteError) or alone:
            return
        if training:
            try:
                self._end_batch(trainer)
                self._save(trainer)
            except Exception as error:
                # The first fault is the one to report.
                log.warning("no checkpoint could be written: %s", error)
                return
            log.warning("stopped at step %d; the same command goes on from %s", trainer.global_step, self.last_path)
        if isinstance(exception, Stopped) and trainer.is_global_zero:
            self._signals.requeue(exception.number)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._signals.release()

    def _after_a_step(self, trainer: Trainer) -> None:
        """Looks at what is due once the step is wholly over, its row of the log included."""
        if not self._stepped or _at_its_end(trainer):
            return
        self._stepped = False
        self._signals.check(trainer)
        if trainer.global_step % self.every_n_steps == 0:
            self._save_if_due(trainer)

    # How to save ----------------------------------------------------------------------------------------------------

    def _save_if_due(self, trainer: Trainer) -> None:
        if trainer.strategy.broadcast(time.monotonic() >= self._not_before):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        start = time.monotonic()
        for logger in _csv_logs(trainer):
            # The log is never behind the checkpoint; where it is ahead, a resumed run cuts it.
            logger.flush()
        if trainer.is_global_zero and self.last_path.exists():
            keep_as(self.last_path, self.last_path.with_name(PREVIOUS))
        trainer.save_checkpoint(self.last_path, weights_only=False)
        now = time.monotonic()
        self._not_before = now + (now - start) * (1 / self.share - 1)

    def _means(self, trainer: Trainer, device: torch.device) -> dict[str, Tensor]:
        """Sum and weight of each running mean, float64, which holds both exactly; a row per process."""
        sums = {name: torch.stack([total.double(), weight.double()]) for name, (total, weight) in self._sums.items()}
        pairs = sums or self._earlier
        return {name: trainer.strategy.all_gather(pair.to(device)).reshape(-1, 2).cpu() for name, pair in pairs.items()}

    def _end_batch(self, trainer: Trainer) -> None:
        """Gives the log the row of a batch that the optimizer used and that broke off before its end."""
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if trainer.training and batches.processed > batches.completed:
            self._note_means(trainer)
            trainer._logger_connector.update_train_step_metrics()

    def _note_means(self, trainer: Trainer) -> None:
        for metric in trainer.fit_loop.epoch_loop._results.values():
            meta = metric.meta
            if not (meta.fx == "training_step" and metric.is_tensor and meta.on_epoch and meta.is_mean_reduction):
                continue
            name = meta.forked_name(on_step=False)
            if name in self._earlier:
                total, weight = self._earlier.pop(name)
                metric.value = metric.value + total.to(metric.value)
                metric.cumulated_batch_size = metric.cumulated_batch_size + weight.to(metric.cumulated_batch_size)
            self._sums[name] = (metric.value, metric.cumulated_batch_size)

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
        checkpoint[MEANS] = {} if between else self._means(trainer, pl_module.device)
        trained = batches["current"]["processed"] >= trainer.num_training_batches
        unfinished = epochs["total"]["started"] > epochs["total"]["completed"]
        if batches["current"]["processed"] > 0 and not trained and not unfinished and not between:
            # max_steps ended the run within an epoch, which Lightning counts as over.
            _set(epochs, "processed", -1)
            _set(epochs, "completed", -1)
            if pl_module.validated_at == trainer.global_step:
                fit["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # an empty turn again, for the validation
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
        """Remembers where in its epoch the loader was, and what had been averaged."""
        states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        self._loader_state = states[0] if states else None
        self._first_step = checkpoint["global_step"]
        rank, world = trainer.global_rank, trainer.world_size
        for name, rows in checkpoint.get(MEANS, {}).items():
            # Other processes than those that saved: the first takes all.
            self._earlier[name] = rows[rank] if len(rows) == world else rows.sum(0) * (rank == 0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cuts from the log what an earlier run trained after the checkpoint."""
        for logger in _csv_logs(trainer):
            logger.cut(self._first_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the loader where it was, and waits for signals.

        Lightning forgets the loader's state when a learning rate schedule asked for the number of steps.
        """
        loader: Any = trainer.train_dataloader
        if self._loader_state is not None:
            loader.load_state_dict(self._loader_state)
        self._loader_state = None
        epochs: Any = trainer.fit_loop.epoch_progress.current
        if epochs.ready == epochs.completed:
            # Between two epochs nothing is left of the one before. Under max_steps Lightning takes it up, and ends it,
            # a second time.
            _not_restarting(trainer)
        # Not earlier than here: Lightning puts back the handlers that it found at the beginning of the fit.
        self._signals.watch(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets a resumed epoch end like any other: while it counts as restarting, no plateau scheduler is asked."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._after_a_step(trainer)
            _not_restarting(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Several processes may have other numbers of validation batches, and stop after them."""
        if trainer.state.fn == TrainerFn.FITTING and trainer.world_size == 1 and not _at_its_end(trainer):
            self._signals.check(trainer)


def _not_restarting(trainer: Trainer) -> None:
    """Not by the fit loop's setter, which makes it true under max_steps whatever is asked for."""
    trainer.fit_loop._restarting = False
    trainer.fit_loop.epoch_loop.restarting = False


def _at_its_end(trainer: Trainer) -> bool:
    """Whether `max_steps` are made and the last epoch is not over.

    Lightning would find nothing left to do in that state, and leave out the epoch's validation: a run that is killed
    now makes its last steps again.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current
    return 0 <= trainer.max_steps <= trainer.global_step and epochs.started > epochs.completed


def _csv_logs(trainer: Trainer) -> list[CSVLog]:
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLog)]


def _set(progress: dict[str, Any], name: str, change: int) -> None:
    for count in (progress["total"], progress["current"]):
        count[name] += change
