"""What a run was and what came out of it, for the loggers."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from diffusion.evaluation.reals import split_identities

LOSSES = {"train": "train/loss_epoch", "val": "val/loss"}


class RunRecord(Callback):
    """Gives the loggers the resolved config with what its run is made of, and W&B a summary of the run.

    Beside the config stand `number_of_parameters` and `num_samples`, the images that are trained on. A W&B logger that
    keeps checkpoints gets the best ones at the end, also those that an earlier process of the run wrote.
    The summary holds `best_train_loss` and `best_val_loss` so far, and at the end `final_train_loss`, `final_val_loss`,
    `total_epochs` and `total_batches`. Its state says which validation loss belongs to which step, and which images
    each split holds, so that a checkpoint knows its own.
    """

    def __init__(self) -> None:
        self._best: dict[str, float] = {}
        self._validated: dict[str, float] = {}  # what the last validation gave, and after which step
        self._batches = 0
        self._splits: dict[str, str] = {}

    @property
    def validated_at(self) -> int | None:
        """Optimizer steps before the last validation, whichever process took it."""
        step = self._validated.get("step")
        return None if step is None else int(step)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        count = sum(p.numel() for p in pl_module.parameters())
        config: dict[str, Any] = getattr(pl_module, "config", {})
        made_of = {"number_of_parameters": count}
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if splits := getattr(datamodule, "splits", None):
            made_of["num_samples"] = len(splits["train"])
            self._splits = split_identities(datamodule)
        for logger in trainer.loggers:
            logger.log_hyperparams({**config, **made_of})

    def on_train_batch_end(self, *_: Any) -> None:  # noqa: D102
        self._batches += 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if not trainer.sanity_checking and LOSSES["val"] in trainer.callback_metrics:
            loss = float(trainer.callback_metrics[LOSSES["val"]])
            self._validated = {"step": trainer.global_step, "val": loss}
            self._note(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        # The epoch's mean of the training loss is there only after the epoch's last hook.
        self._note(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._note(trainer)
        metrics = trainer.callback_metrics
        summary: dict[str, Any] = {f"final_{n}_loss": float(metrics[k]) for n, k in LOSSES.items() if k in metrics}
        _summarise(trainer, summary | {"total_epochs": trainer.current_epoch, "total_batches": self._batches})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        # Lightning's loggers know only of the checkpoints that this process saved.
        for part in trainer.checkpoint_callbacks:
            if isinstance(part, ModelCheckpoint) and part.best_model_score is not None and trainer.is_global_zero:
                for logger in trainer.loggers:
                    logger.after_save_checkpoint(part)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {
            "best": dict(self._best),
            "validated": dict(self._validated),
            "batches": self._batches,
            "splits": self._splits,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self._best, self._batches = dict(state_dict["best"]), state_dict["batches"]
        self._validated = dict(state_dict.get("validated", {}))

    def _note(self, trainer: Trainer) -> None:
        for name, key in LOSSES.items():
            if key in trainer.callback_metrics:
                value = float(trainer.callback_metrics[key])
                self._best[name] = min(value, self._best.get(name, value))
        # Not at the end alone: a run that breaks off has none.
        _summarise(trainer, {f"best_{name}_loss": value for name, value in self._best.items()})


def _summarise(trainer: Trainer, summary: dict[str, Any]) -> None:
    for logger in trainer.loggers:
        if type(logger).__name__ == "WandbLogger" and trainer.is_global_zero:
            logger.experiment.summary.update(summary)  # type: ignore[attr-defined]
