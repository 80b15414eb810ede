"""How well images match their prompts, by CLIP."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric

from diffusion.conditioning.base import Conditioner
from diffusion.conditioning.clip import Clip
from diffusion.conditioning.openclip import ClipModel, load_clip
from diffusion.errors import AntherError
from diffusion.images import to_pil


class ClipScore(Metric):
    """Mean cosine of the CLIP embeddings of images and their prompts, in [-1, 1].

    score(x, p) = E_image(x) . E_text(p) / (|E_image(x)| |E_text(p)|)

    An image is scored as the PNG that would be written of it: clamped and rounded to 8 bits, grey as RGB. Scores of
    different CLIPs do not compare, so `name` belongs beside every number. CLIP is loaded with the first image, or by
    `load`, and stays out of parameters and state dict. Sums are reduced over ranks, so the mean is exact for shards
    of any sizes.

    Args:
        model: see `load_clip`.
        pretrained: see `load_clip`.
        setting: see `load_clip`.

    Attributes:
        name: the CLIP that scores: `ViT-B-32/laion2b_s34b_b79k`.
        last: scores (B,) of the images of the last `update`, on the CPU.

    Reference: Hessel et al., 2021, arXiv:2104.08718, without its factor 2.5 and its clipping at 0.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, model: str, pretrained: str, setting: str = "clip") -> None:
        super().__init__()
        self.model = model
        self.pretrained = pretrained
        self.setting = setting
        self.name = f"{model}/{pretrained}"
        self.last = torch.zeros(0)
        self._clip: ClipModel | None = None
        self._texts: dict[str, Tensor] = {}
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def load(self) -> ClipModel:
        """The CLIP, loaded now if it was not yet: call it before hours of work that end in a score.

        Raises:
            AntherError: see `load_clip`.
        """
        if self._clip is None:
            self._clip = load_clip(self.model, self.pretrained, self.device, self.setting)
            self.name = self._clip.name
        return self._clip.to(self.device)

    def conditions(self, conditioner: Conditioner | None) -> bool:
        """Whether this CLIP is also the condition of a model, whose score it then flatters.

        By the weights: one CLIP has several names, and a file of it none. Images that are drawn already may be scored
        where the model's own CLIP is not; then only its name can tell.
        """
        if not isinstance(conditioner, Clip):
            return False
        if (conditioner.model, conditioner.pretrained) == (self.model, self.pretrained):
            return True
        try:
            return conditioner.weights_hash == self.load().weights_hash
        except AntherError:
            return False

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images without counting them.

        Args:
            images: (B, C, H, W), C = 1 or 3, float, values in [-1, 1].
            prompts: one per image.

        Raises:
            AntherError: numbers that do not match, or values outside [-1, 1].
        """
        if images.ndim != 4 or len(images) != len(prompts):
            raise AntherError(
                f"CLIP score: {len(prompts)} prompts for images of shape {tuple(images.shape)}; give one each."
            )
        if not images.is_floating_point() or not bool((images.abs() <= 1 + 1e-4).all()):
            raise AntherError("CLIP score: images must be float in [-1, 1]; convert or clamp them first.")
        clip = self.load()
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            self._texts.update(zip(new, normalize(clip.encode_texts(new)).cpu(), strict=True))
        if not prompts:
            return torch.zeros(0)
        texts = torch.stack([self._texts[prompt] for prompt in prompts])
        return (normalize(clip.encode_images([to_pil(image) for image in images])).cpu() * texts).sum(1)

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Counts images; see `score`."""
        self.last = self.score(images, prompts)
        self.total += self.last.double().sum().to(self.total.device)
        self.count += len(self.last)

    def compute(self) -> Tensor:
        """Mean cosine over all images of all ranks; NaN where there were none."""
        return self.total / self.count

    @property
    def percent(self) -> float:
        """The mean times 100, as results tables print it (seed 001's 28.7 is 0.287)."""
        return 100 * float(self.compute())
