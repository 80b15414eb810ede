"""What an autoencoder keeps of images, as training goes on."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.counts import check_counts
from callbacks.ema import averaged
from callbacks.measure import due
from datamodules.base import ImageDataModule
from diffusion.files import atomic
from diffusion.images import TableRows, from_uint8, grid, to_pil
from diffusion.loggers import log_picture
from diffusion.modules.autoencoder import VariationalAutoencoder


class ReconstructionGrid(Callback):
    """Draws the first validation images above their reconstructions, with the averaged weights where there are any.

    Writes `step-000400.png` every few epochs and at the end of the fit; loggers that hold pictures get
    `reconstructions`. One process draws, the others wait.

    Args:
        dirpath: folder of the pictures.
        images: how many.
        columns: pairs per row.
        every_n_epochs: how often.
        scale: pixels of the picture per pixel of the image.
    """

    def __init__(
        self, dirpath: str | Path, images: int = 16, columns: int = 8, every_n_epochs: int = 5, scale: int = 2
    ) -> None:
        check_counts("reconstructions", images=images, columns=columns, every_n_epochs=every_n_epochs, scale=scale)
        self.dirpath = Path(dirpath)
        self.images, self.columns, self.every_n_epochs, self.scale = images, columns, every_n_epochs, scale

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if due(trainer, self.every_n_epochs) and trainer.is_global_zero:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if trainer.is_global_zero:
            with averaged(trainer, pl_module):
                self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, VariationalAutoencoder)
        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        # Not `data.pixels`, which copies the whole split.
        validation = TableRows(data.table.images, data.splits["val"], data.image_shape[1])
        originals = from_uint8(validation[: self.images])
        was_training = module.training
        module.eval()
        back = module.reconstruct(originals.to(module.device)).float().cpu().clamp(-1, 1)
        module.train(was_training)
        rows = []
        for start in range(0, len(originals), self.columns):
            part = slice(start, start + self.columns)
            rows += [originals[part], back[part]]
        # A last row that is shorter would move the pairs apart.
        missing = -len(originals) % self.columns
        blank = originals.new_ones(missing, *originals.shape[1:])
        rows[-2:] = [torch.cat([row, blank]) for row in rows[-2:]]
        path = self.dirpath / f"step-{trainer.global_step:06d}.png"
        with atomic(path) as temporary:
            to_pil(grid(torch.cat(rows), self.columns, scale=self.scale)).save(temporary, format="PNG")
        log_picture(trainer.loggers, "reconstructions", path, trainer.global_step)
