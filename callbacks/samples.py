"""Pictures of what the model draws, as training goes on."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.counts import check_counts
from callbacks.drawing import Cell, cells, check_weights, draw
from callbacks.ema import averaged
from callbacks.measure import due
from diffusion.conditioning.labels import Labels
from diffusion.errors import AntherError
from diffusion.files import atomic
from diffusion.images import save_gif, sheet, to_pil
from diffusion.loggers import log_picture, log_table
from diffusion.modules.generator import Generator
from diffusion.samplers import Sampler
from diffusion.trajectory import Trajectory


class SampleGrid(Callback):
    """Draws the same seeds and prompts every few epochs and at the end of the fit, with the averaged weights.

    Writes `step-000400.png`, a row per guidance weight and a column per image; `step-000400.json`, which says for each
    cell its row, column, prompt, weight and seed, and of which epoch all are, counted from 0 as in `metrics.csv`; and
    `step-000400.gif`, the way from noise to those images. Loggers that hold pictures get `samples_grid`, and W&B the
    table `sample_prediction`. One process draws, the others wait.

    Args:
        dirpath: folder of the pictures.
        prompts: None for a model without a condition.
        weights: guidance weights; None takes the module's.
        per_prompt: images per prompt and weight.
        seed: of the first image.
        every_n_epochs: how often.
        gif: which draws also get the animation.
        sampler: instead of the module's own.
        batch_size: images at a time.
        columns: of the grid; None takes the images of one weight.
        scale: pixels of the picture per pixel of the image.
    """

    def __init__(
        self,
        dirpath: str | Path,
        prompts: Sequence[str | int] | None = None,
        weights: Sequence[float] | None = None,
        per_prompt: int = 1,
        seed: int = 0,
        every_n_epochs: int = 5,
        gif: Literal["never", "last", "always"] = "last",
        sampler: Sampler | None = None,
        batch_size: int = 64,
        columns: int | None = None,
        scale: int = 2,
    ) -> None:
        if gif not in ("never", "last", "always"):
            raise AntherError(f"callbacks.samples.gif is never, last or always, not {gif!r}.")
        check_counts(
            "samples", per_prompt=per_prompt, every_n_epochs=every_n_epochs, batch_size=batch_size, scale=scale
        )
        check_counts("samples", columns=1 if columns is None else columns)
        check_weights("samples", weights)
        self.dirpath = Path(dirpath)
        self.prompts, self.weights, self.per_prompt, self.seed = prompts, weights, per_prompt, seed
        self.every_n_epochs, self.gif = every_n_epochs, gif
        self.sampler, self.batch_size, self.columns, self.scale = sampler, batch_size, columns, scale
        self.last_picture: Path | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds out before the first step whether the prompts can be drawn."""
        assert isinstance(pl_module, Generator)
        if self.gif != "never" and pl_module.sampler is None:
            raise AntherError(
                "this model draws in one call, and there is no way from noise to show: set callbacks.samples.gif=never."
            )
        wanted = self._cells(pl_module)
        if trainer.is_global_zero:
            pl_module.check_request([str(c.prompt) for c in wanted] if self.prompts else None, len(wanted))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if due(trainer, self.every_n_epochs) and trainer.is_global_zero:
            self._draw(trainer, pl_module, trainer.current_epoch, animate=self.gif == "always")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if trainer.is_global_zero:
            with averaged(trainer, pl_module):
                # By now the trainer counts the last epoch as done.
                self._draw(trainer, pl_module, max(trainer.current_epoch - 1, 0), animate=self.gif != "never")

    def _cells(self, module: Generator) -> list[Cell]:
        return cells(module, self.prompts, self.weights, self.per_prompt, self.seed)

    def _draw(self, trainer: Trainer, module: LightningModule, epoch: int, animate: bool) -> None:
        assert isinstance(module, Generator)
        path = self.dirpath / f"step-{trainer.global_step:06d}.png"
        if path == self.last_picture and not animate:
            return
        wanted = self._cells(module)
        columns = self.columns or len(wanted) // len(self.weights or [None])
        trajectory = Trajectory()
        images = draw(module, wanted, self.batch_size, self.sampler, trajectory if animate else None)
        captions = [_caption(cell) for cell in wanted]
        with atomic(path) as temporary:
            sheet(images, captions, columns, self.scale).save(temporary, format="PNG")
        if animate:
            save_gif(trajectory.pictures(columns, self.scale), path.with_suffix(".gif"))
        record = {
            "epoch": epoch,
            "step": trainer.global_step,
            "cells": [{"row": k // columns, "column": k % columns, **asdict(c)} for k, c in enumerate(wanted)],
        }
        with atomic(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(record, indent=1))
        if path == self.last_picture:
            return
        self.last_picture = path
        log_picture(trainer.loggers, "samples_grid", path, trainer.global_step)
        what = "Class_Label" if isinstance(module.conditioner, Labels) else "Prompt"
        log_table(
            trainer.loggers,
            "sample_prediction",
            ["epoch", what, "guidance_weight", "image"],
            [[epoch, c.prompt, c.weight, to_pil(x)] for c, x in zip(wanted, images, strict=True)],
            trainer.global_step,
        )


def _caption(cell: Cell) -> str:
    return f"seed {cell.seed}" if cell.prompt is None else f"{cell.prompt}, w = {cell.weight:g}"
