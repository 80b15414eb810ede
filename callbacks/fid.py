"""Fréchet distance while training: are the drawn images, as a set, like the real ones?"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from callbacks.counts import check_counts
from callbacks.drawing import Cell, cells, draw
from callbacks.measure import Measure
from diffusion.evaluation.distribution import check_number
from diffusion.evaluation.inception import Extractor, load_extractor
from diffusion.evaluation.reals import read_reals
from diffusion.evaluation.reference import Reference, reference
from diffusion.images import to_uint8
from diffusion.modules.generator import Generator
from diffusion.samplers import Sampler

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

_CHUNK = 1024  # real features in float64 at a time: 16 MB


class GenerationFid(Measure):
    """Draws images every few epochs, with the averaged weights, and holds them against the real ones.

    Logs `val/fid_500`: torchmetrics' FID over the features of torch-fidelity's Inception. N is part of the name, since
    FID depends on it. It orders the epochs of a run; the figure to report is that of evaluate.py, which equals
    torch-fidelity's to 1e-6 also where N is below the 2,048 features and torchmetrics' root rounds by some 1e-4.
    Statistics of the reals come from the cache that evaluate.py shares. Every rank draws its share.

    Args:
        num_images: N, of which image k has the seed `seed + k`.
        prompts: for a model that takes some: image k has prompt k mod their number. Drawn with the model's own weight.
        split: which real images: train, val, test, or all of them. Where a checkpoint is chosen by this distance, test
            images, which all holds too, would no longer be test images for it.
        every_n_epochs: how often.
        seed: of the first image.
        sampler: instead of the module's own.
        batch_size: images at a time.
        weights: the Inception, see `diffusion.evaluation.inception.load_extractor`.

    Reference: Heusel et al., 2017, arXiv:1706.08500.
    """

    def __init__(
        self,
        num_images: int = 500,
        prompts: Sequence[str | int] | None = None,
        split: str = "train",
        every_n_epochs: int = 10,
        seed: int = 0,
        sampler: Sampler | None = None,
        batch_size: int = 64,
        weights: Path | str | None = None,
    ) -> None:
        check_counts("fid", num_images=num_images, every_n_epochs=every_n_epochs, batch_size=batch_size)
        super().__init__(f"val/fid_{num_images}", every_n_epochs)
        self.num_images, self.prompts, self.split, self.seed = num_images, prompts, split, seed
        self.sampler, self.batch_size = sampler, batch_size
        self.weights = weights
        self._extractor: Extractor | None = None
        self._metric: FrechetInceptionDistance | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loads Inception and the reals' statistics before the first step, so that a fault shows now."""
        assert isinstance(pl_module, Generator)
        cells(pl_module, self.prompts, None, 1, self.seed)
        reals = read_reals(trainer.datamodule, self.split)  # type: ignore[attr-defined]
        check_number(self.num_images, len(reals.rows))
        self._extractor = load_extractor(self.weights, pl_module.device)
        # One process per machine fills the cache, the others read it.
        for turn in (trainer.local_rank == 0, trainer.local_rank != 0):
            if turn:
                found = reference(reals.pixels, reals.names, reals.digest, reals.split, self._extractor)
            trainer.strategy.barrier()
        self._metric = self._against(found, trainer)

    @staticmethod
    def _against(found: Reference, trainer: Trainer) -> "FrechetInceptionDistance":
        from torchmetrics.image.fid import FrechetInceptionDistance

        # It is given features: its own preprocessing would antialias and truncate.
        as_they_are = nn.Identity()
        as_they_are.num_features = found.features.shape[1]
        device = trainer.strategy.root_device
        metric = FrechetInceptionDistance(as_they_are, reset_real_features=False)
        metric.to("cpu" if device.type == "mps" else device)  # which has no float64
        mine = range(trainer.global_rank, len(found), trainer.world_size)
        for k in range(0, len(mine), _CHUNK):
            rows = found.features[np.asarray(mine[k : k + _CHUNK])].astype(np.float64)
            metric.update(torch.from_numpy(rows).to(metric.device), real=True)
        return metric

    def take(self, trainer: Trainer, module: LightningModule) -> None:
        """Draws and scores this rank's share, and logs what all ranks found."""
        assert isinstance(module, Generator)
        assert self._extractor is not None
        assert self._metric is not None
        mine = self._cells(module)[trainer.global_rank :: trainer.world_size]
        for k in range(0, len(mine), self.batch_size):
            images = draw(module, mine[k : k + self.batch_size], self.batch_size, self.sampler)
            rows = np.asarray(self._extractor.part_features(to_uint8(images)).pool[:], np.float64)
            self._metric.update(torch.from_numpy(rows).to(self._metric.device), real=False)
        module.log(self.name, self._metric.compute().float(), prog_bar=True)
        self._metric.reset()

    def _cells(self, module: Generator) -> list[Cell]:
        kinds = cells(module, self.prompts, None, 1, self.seed)
        return [replace(kinds[k % len(kinds)], seed=self.seed + k) for k in range(self.num_images)]
