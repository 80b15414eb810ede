"""Embeddings from inside the network, row by row those of known images."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.counts import check_counts
from callbacks.drawing import cells, check_weights, draw
from callbacks.measure import due
from diffusion.errors import AntherError
from diffusion.evaluation.embeddings import Captured, Form, capture, reduced, save_embeddings
from diffusion.images import save_png
from diffusion.modules.diffusion import Diffusion
from diffusion.rng import generator
from diffusion.samplers import Sampler


class BottleneckEmbeddings(Callback):
    """Saves a layer's output for fixed images every few epochs, with the averaged weights.

    `samples` draws images and takes the layer's output in the sampler's last step, that is for the image with the
    least noise; `val` takes the validation images at the least noise, t = 1 / T. The file `step-000400.npz` holds
    `ids`, `embeddings` (row i is of the image ids[i]) and, for samples, `prompts`, `weights` and `seeds`; the drawn
    images lie beside it as `step-000400/<id>.png`. Rank 0 draws alone; validation images are those of all ranks.

    Args:
        dirpath: folder of the files.
        layer: name of a submodule of the network; None takes its bottleneck.
        form: `pooled` over positions, `flat` or `raw`.
        source: `samples` or `val`.
        prompts: None for a model without a condition.
        weights: guidance weights; None takes the module's.
        per_prompt: images per prompt and weight.
        seed: of the first image.
        every_n_epochs: how often.
        sampler: instead of the module's own.
        batch_size: images at a time.
    """

    def __init__(
        self,
        dirpath: str | Path,
        layer: str | None = None,
        form: Form = "pooled",
        source: Literal["samples", "val"] = "samples",
        prompts: Sequence[str | int] | None = None,
        weights: Sequence[float] | None = None,
        per_prompt: int = 1,
        seed: int = 0,
        every_n_epochs: int = 5,
        sampler: Sampler | None = None,
        batch_size: int = 64,
    ) -> None:
        if source not in ("samples", "val"):
            raise AntherError(f"callbacks.embeddings.source is samples or val, not {source!r}.")
        check_counts("embeddings", per_prompt=per_prompt, every_n_epochs=every_n_epochs, batch_size=batch_size)
        check_weights("embeddings", weights)
        self.dirpath = Path(dirpath)
        self.layer, self.form, self.source = layer, form, source
        self.prompts, self.weights, self.per_prompt, self.seed = prompts, weights, per_prompt, seed
        self.every_n_epochs, self.sampler, self.batch_size = every_n_epochs, sampler, batch_size
        self._rows: dict[int, Tensor] = {}  # of validation images, by row of the table

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds out before the first step whether the layer exists and the form is known."""
        assert isinstance(pl_module, Diffusion)
        reduced(torch.zeros(1, 1, 1, 1), self.form)
        with self._capture(pl_module):
            pass

    def on_validation_batch_end(  # noqa: D102
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.source != "val" or not due(trainer, self.every_n_epochs):
            return
        assert isinstance(pl_module, Diffusion)
        x_0, index = batch["image"], batch["index"].tolist()
        denoiser = pl_module.denoiser
        t = torch.full((len(x_0),), 1 / denoiser.schedule.T, dtype=torch.float64, device=x_0.device)
        eps = torch.stack([torch.randn(x_0.shape[1:], generator=generator(self.seed, i)) for i in index]).to(x_0)
        with torch.no_grad(), self._capture(pl_module) as captured:
            denoiser(denoiser.diffuse(x_0, t, eps), t, pl_module.validation_condition(batch))
        self._rows |= dict(zip(index, reduced(captured.rows(len(x_0)), self.form).cpu(), strict=True))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if not due(trainer, self.every_n_epochs):
            return
        path = self.dirpath / f"step-{trainer.global_step:06d}.npz"
        if self.source == "val":
            index, rows = _gathered(self._rows, pl_module)
            self._rows = {}
            if trainer.is_global_zero:
                names = trainer.datamodule.table.names  # type: ignore[attr-defined]
                save_embeddings(path, [names[i] for i in index], rows)
            return
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Diffusion)
        wanted = cells(pl_module, self.prompts, self.weights, self.per_prompt, self.seed)
        ids = [f"{k:04d}" for k in range(len(wanted))]
        images, rows_drawn = [], []
        with self._capture(pl_module) as captured:
            for k in range(0, len(wanted), self.batch_size):
                part = wanted[k : k + self.batch_size]
                images.append(draw(pl_module, part, self.batch_size, self.sampler))
                rows_drawn.append(reduced(captured.rows(len(part)), self.form).cpu())
        for name, image in zip(ids, torch.cat(images), strict=True):
            save_png(image, path.with_suffix("") / f"{name}.png")
        extra: dict[str, list[Any]] = {"seeds": [cell.seed for cell in wanted]}
        if self.prompts:
            extra |= {"prompts": [cell.prompt for cell in wanted], "weights": [cell.weight for cell in wanted]}
        save_embeddings(path, ids, torch.cat(rows_drawn), extra)

    def _capture(self, module: Diffusion) -> AbstractContextManager[Captured]:
        return capture(module.trained, self.layer or module.bottleneck)


def _gathered(own: Mapping[int, Tensor], module: LightningModule) -> tuple[list[int], Tensor]:
    """The rows of all ranks, in the order of the table: their numbers, and the rows on the CPU."""
    index, rows = torch.tensor(list(own)), torch.stack(list(own.values()))
    # Ranks may have one more or one less, and only equal shapes can be gathered.
    counts = module.all_gather(torch.tensor(len(index), device=module.device))
    assert isinstance(counts, Tensor)
    most, world = int(counts.max()), counts.numel()
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    numbers = torch.full((most,), -1).index_copy(0, torch.arange(len(index)), index)
    everything = module.all_gather(padded.to(module.device))
    which = module.all_gather(numbers.to(module.device))
    assert isinstance(everything, Tensor)
    assert isinstance(which, Tensor)
    which, everything = which.view(-1).cpu(), everything.view(most * world, *rows.shape[1:]).cpu()
    order = which.argsort()[(which < 0).sum() :]
    return which[order].tolist(), everything[order]
