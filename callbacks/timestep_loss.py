"""Where in time the loss lies."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.counts import check_counts
from diffusion.errors import AntherError
from diffusion.files import atomic
from diffusion.loggers import log_picture
from diffusion.modules.diffusion import Diffusion


class TimestepLoss(Callback):
    """Mean loss within equal parts of t in (0, 1], once per epoch.

    Logs `{stage}/loss_by_t/0.95` and so on, named by the middle of the part, and draws `{stage}_loss_by_t.png` with the
    curves of the first, the last and the best epoch of this process.

    Args:
        dirpath: folder of the picture.
        bins: parts of the time axis.
        stage: which losses are looked at.
    """

    def __init__(self, dirpath: str | Path, bins: int = 10, stage: Literal["train", "val"] = "val") -> None:
        if stage not in ("train", "val"):
            raise AntherError(f"callbacks.timestep_loss.stage is train or val, not {stage!r}.")
        check_counts("timestep_loss", bins=bins)
        self.path = Path(dirpath) / f"{stage}_loss_by_t.png"
        self.bins = bins
        self.stage = stage
        self._sums = torch.zeros(2, bins, dtype=torch.float64)  # losses, counts
        self._curves: dict[int, Tensor] = {}

    @property
    def middles(self) -> list[float]:
        """The middle of each part."""
        return [(k + 0.5) / self.bins for k in range(self.bins)]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: D102
        if self.stage == "train":
            self._add(pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: D102
        if self.stage == "val":
            self._add(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if self.stage == "train":
            self._report(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if self.stage == "val":
            self._report(trainer, pl_module)

    def _add(self, module: LightningModule) -> None:
        assert isinstance(module, Diffusion)
        t, loss = (module.last_losses[name].double() for name in ("t", "loss"))
        # t = 1 belongs to the last part, and a time on a border to the part below it.
        part = ((t * self.bins).ceil() - 1).clamp(0, self.bins - 1).long()
        sums = torch.zeros(2, self.bins, dtype=torch.float64, device=t.device)
        sums[0].index_add_(0, part, loss)
        sums[1].index_add_(0, part, torch.ones_like(loss))
        # Sums stay where the losses are, so that no batch waits for the GPU.
        self._sums = self._sums.to(t.device) + sums

    def _report(self, trainer: Trainer, module: LightningModule) -> None:
        sums = trainer.strategy.reduce(self._sums, reduce_op="sum")
        assert isinstance(sums, Tensor)
        self._sums = torch.zeros_like(self._sums)
        if trainer.sanity_checking:
            return
        curve = (sums[0] / sums[1]).cpu()  # nan where no time fell
        for middle, value in zip(self.middles, curve, strict=True):
            if value.isfinite():
                module.log(f"{self.stage}/loss_by_t/{middle:.2f}", value.float(), rank_zero_only=True)
        if trainer.is_global_zero:
            self._curves[trainer.current_epoch] = curve
            self._draw()
            log_picture(trainer.loggers, f"{self.stage}_loss_by_t", self.path, trainer.global_step)

    def _draw(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # Figure and canvas by hand: pyplot would keep global state and choose a backend for the whole process.
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        best = min(self._curves, key=lambda epoch: float(self._curves[epoch].nanmean()))
        for epoch in sorted({min(self._curves), best, max(self._curves)}):
            axes.plot(self.middles, self._curves[epoch], marker="o", label=f"epoch {epoch}")
        axes.set(xlabel="t (0: clean, 1: noise)", ylabel=f"{self.stage} loss", yscale="log")
        axes.legend()
        with atomic(self.path) as temporary:
            FigureCanvasAgg(figure).print_png(str(temporary))  # type: ignore[no-untyped-call]
