"""Time, speed, memory and size of a training."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class Throughput(Callback):
    """Logs once per epoch what it cost.

        epoch_seconds      of training alone: without validation, and what is drawn and saved around it
        images_per_second  of training alone, over all devices
        peak_gpu_mem_mb    MiB allocated by PyTorch on this process's GPU in the epoch; on CUDA only
        lr                 learning rate of the first parameter group

    and, once, `parameters`, the number of trained parameters.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._paused = 0.0
        self._images = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if trainer.global_step == 0:
            count = sum(p.numel() for p in pl_module.parameters())
            for logger in trainer.loggers:
                logger.log_metrics({"parameters": count}, step=0)
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._paused, self._images = 0.0, 0
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._start = _now(pl_module)

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Mapping[str, Tensor], batch_idx: int
    ) -> None:
        self._images += len(batch["image"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._paused -= _now(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._paused += _now(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        seconds = _now(pl_module) - self._start - self._paused
        values = {
            "epoch_seconds": seconds,
            "images_per_second": self._images * trainer.world_size / seconds,
            "lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
        }
        if pl_module.device.type == "cuda":
            values["peak_gpu_mem_mb"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**20
        pl_module.log_dict(values, rank_zero_only=True)


def _now(module: LightningModule) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()
