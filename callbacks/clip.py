"""CLIP score while training: do the drawn images show what the prompts say?"""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from callbacks.counts import check_counts
from callbacks.drawing import cells, draw
from callbacks.measure import Measure
from diffusion.errors import AntherError
from diffusion.evaluation.clip_score import ClipScore
from diffusion.modules.diffusion import Diffusion
from diffusion.samplers import Sampler


class GenerationClipScore(Measure):
    """Draws fixed prompts at fixed guidance weights every few epochs, with the averaged weights, and scores them.

    Logs `val/clip_score`, the mean over all images, and `val/clip_score_w2` and so on per weight: cosines in [-1, 1].
    The scoring CLIP belongs to this callback and enters no state dict. Every rank draws and scores its share.

    Args:
        prompts: what to draw.
        weights: guidance weights.
        model: the scoring CLIP, see `diffusion.conditioning.openclip.load_clip`.
        pretrained: its weights.
        per_prompt: images per prompt and weight.
        seed: of the first image.
        every_n_epochs: how often.
        sampler: instead of the module's own.
        batch_size: images at a time.

    Reference: Hessel et al., 2021, arXiv:2104.08718.
    """

    def __init__(
        self,
        prompts: Sequence[str | int],
        weights: Sequence[float] = (0.5, 1.0, 2.0, 5.0),
        model: str = "ViT-B-32",
        pretrained: str = "laion2b_s34b_b79k",
        per_prompt: int = 1,
        seed: int = 0,
        every_n_epochs: int = 5,
        sampler: Sampler | None = None,
        batch_size: int = 64,
    ) -> None:
        if not prompts or not weights:
            raise AntherError("callbacks.clip needs at least one prompt and one weight.")
        check_counts("clip", per_prompt=per_prompt, every_n_epochs=every_n_epochs, batch_size=batch_size)
        super().__init__("val/clip_score", every_n_epochs)
        self.prompts, self.weights, self.per_prompt, self.seed = prompts, weights, per_prompt, seed
        self.sampler, self.batch_size = sampler, batch_size
        self.scorer = ClipScore(model, pretrained, "callbacks.clip")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loads CLIP and looks at the prompts before the first step, so that a fault shows now and not in an hour."""
        assert isinstance(pl_module, Diffusion)
        cells(pl_module, self.prompts, self.weights, self.per_prompt, self.seed)
        pl_module.sampling_condition([str(prompt) for prompt in self.prompts], len(self.prompts))
        self.scorer.to(pl_module.device)
        self.scorer.load()
        if self.scorer.conditions(pl_module.conditioner):
            rank_zero_only(print)(
                f"CLIP score: {self.scorer.name} also conditions the model, so the score flatters it; it compares "
                "epochs of this run, not models."
            )

    def take(self, trainer: Trainer, module: LightningModule) -> None:
        """Draws and scores this rank's share, and logs what all ranks found."""
        assert isinstance(module, Diffusion)
        wanted = cells(module, self.prompts, self.weights, self.per_prompt, self.seed)
        mine = range(trainer.global_rank, len(wanted), trainer.world_size)
        scores = torch.zeros(len(wanted), dtype=torch.float64)
        if part := [wanted[k] for k in mine]:
            images = draw(module, part, self.batch_size, self.sampler)
            scores[list(mine)] = self.scorer.score(images, [str(cell.prompt) for cell in part]).double()
        reduced = trainer.strategy.reduce(scores.to(module.device), reduce_op="sum")
        assert isinstance(reduced, Tensor)
        # cells are weight-major
        rows = reduced.float().view(len(self.weights), -1).mean(1)
        module.log("val/clip_score", rows.mean(), prog_bar=True)
        for weight, row in zip(self.weights, rows, strict=True):
            module.log(f"val/clip_score_w{weight:g}", row)
