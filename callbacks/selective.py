"""What a classifier is worth that may decline, at the end of its training."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from diffusion.errors import AntherError, install
from diffusion.evaluation.classifier import export_classifier
from diffusion.evaluation.selection import Judged, Rule, assess, describe
from diffusion.images import from_uint8
from diffusion.networks.classifier import infer


class SelectiveReport(Callback):
    """Fits temperature and threshold on the split `calibration`, reports on `test`, and exports the classifier.

    Rank 0 writes `selective.json`, pictures in `plots/` and `classifier.safetensors` into the run folder, and the
    loggers get `test/accuracy`, `test/coverage` and `test/aurc`.

    Args:
        dirpath: the run folder.
        rule: how the threshold is chosen: accuracy, coverage or elbow.
        target: the accuracy or coverage of the calibration digits that are accepted; null with elbow.
    """

    def __init__(self, dirpath: str | Path, rule: Rule = "accuracy", target: float | None = 0.999) -> None:
        self.dirpath, self.rule, self.target = Path(dirpath), rule, target

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks for what the end needs before the first hour is spent.

        Raises:
            AntherError: the data have no split to calibrate on, or scipy is missing.
        """
        if importlib.util.find_spec("scipy") is None:
            raise AntherError(f"callbacks.selective needs scipy, which is not installed: {install('eval')}.")
        splits = trainer.datamodule.splits  # type: ignore[attr-defined]
        if absent := {"calibration", "test"} - set(splits):
            raise AntherError(
                f"callbacks.selective needs the splits calibration and test, and the data lack {', '.join(absent)}: "
                "set data.split={train: 0.9, val: 0.05, calibration: 0.05}."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports and exports."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        network: Any = pl_module.network

        def judged(split: str) -> Judged:
            logits, _ = infer(network, from_uint8(data.pixels(split)))
            rows = torch.from_numpy(data.splits[split])
            return Judged(logits.double().numpy(), data.table.labels[rows].numpy(), data.digits[rows].numpy())

        found = assess(judged("calibration"), judged("test"), network.digits, self.rule, self.target, self.dirpath)
        for logger in trainer.loggers:
            values = {
                "test/accuracy": found["accuracy"],
                "test/coverage": found["selective"]["coverage"],
                "test/aurc": found["aurc"],
            }
            logger.log_metrics(values, trainer.global_step)
        config = getattr(pl_module, "config", {})
        facts = {
            **found,
            "experiment": config.get("name"),
            "seed": config.get("seed"),
            "steps": trainer.global_step,
            "data": data.describe(),
            "data_digest": data.table.digest,
        }
        path = self.dirpath / "classifier.safetensors"
        export_classifier(network, facts, path)
        for heading, words in describe(found).items():
            print(f"{heading:21} {words}")
        print(f"{'the classifier':21} {path}")
