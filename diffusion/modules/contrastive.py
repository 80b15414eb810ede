"""Training a small CLIP on pictures and their captions, and the compact file it ships as."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from diffusion.errors import AntherError
from diffusion.files import atomic
from diffusion.images import from_uint8
from diffusion.modules.base import Module
from diffusion.modules.epoch_mean import epoch_mean
from diffusion.modules.learning_rate import MakeScheduler

# Images reach the model as they are in a batch, in [-1, 1].
MEAN = STD = (0.5, 0.5, 0.5)
MAX_LOGIT_SCALE = 100.0


def soft_contrastive_loss(image: Tensor, text: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """Contrastive loss in which equal captions are positives of each other.

    With logits l_ij = scale · <image_i, text_j> and targets p_ij = same_ij / Σ_k same_ik, the loss of a sample is the
    mean of the two cross-entropies -Σ_j p_ij log softmax_j(l_ij) and -Σ_j p_ij log softmax_j(l_ji). Where all captions
    differ this is the loss of CLIP (Radford et al., 2021, arXiv:2103.00020).

    Args:
        image: unit vectors (B, d).
        text: unit vectors (B, d); row i belongs to image i.
        same: bool (B, B), symmetric: captions i and j are equal.
        scale: inverse temperature, a scalar.

    Returns:
        One value per sample, (B,).
    """
    logits = scale * image @ text.T
    target = same.to(logits) / same.sum(1, keepdim=True)
    by_image = -(target * logits.log_softmax(1)).sum(1)
    by_text = -(target * logits.T.log_softmax(1)).sum(1)
    return (by_image + by_text) / 2


class Contrastive(Module):
    """A CLIP of `open_clip` trained from nothing on the pictures and captions of the data module.

    Logs `train/loss`, `val/loss` and `val/retrieval`: the share of validation images whose own caption is the nearest
    among all captions of the validation batch. At the end of a fit, rank 0 writes the compact file (`export_clip`)
    into the run folder.

    Args:
        model_cfg: an `open_clip` model config: embed_dim, vision_cfg, text_cfg. The image size is that of the data.
        optimizer: groups of parameters -> optimizer; its weight decay is that of matrices, for vectors, embeddings and
            the temperature have none.
        scheduler: (optimizer, total_steps) -> Lightning's `lr_scheduler` config; see `modules.learning_rate`.
        seed: of what `patch_dropout` leaves out.
        name: what the exported model is called.
        file_name: of the export, in the run folder.
    """

    def __init__(
        self,
        *,
        model_cfg: Mapping[str, Any],
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer],
        scheduler: MakeScheduler | None = None,
        seed: int = 0,
        name: str = "anther-flowers-32",
        file_name: str = "flowers_clip.safetensors",
    ) -> None:
        super().__init__(seed)
        from open_clip import CLIP

        self.model_cfg = json.loads(json.dumps(model_cfg))  # plain and our own
        self.clip = CLIP(**self.model_cfg)
        self._make_optimizer, self._make_scheduler = optimizer, scheduler
        self.name, self.file_name = name, file_name
        # The resolved config of the run; the entry point sets it, checkpoints carry it.
        self.config: dict[str, Any] = {}
        self.val_loss, self.val_retrieval = epoch_mean(), epoch_mean()
        self._tokens = torch.zeros(0, 0, dtype=torch.int64)
        self._caption = torch.zeros(0, dtype=torch.int64)

    @property
    def size(self) -> int:
        """Pixels per side of the images it takes."""
        return int(self.model_cfg["vision_cfg"]["image_size"])

    def describe(self) -> dict[str, str]:
        """What a person wants to know before the run, by heading."""
        used = sum(p.numel() for p in self.clip.parameters()) - self.clip.token_embedding.weight.numel()
        return {
            "network": f"CLIP, {used:,} parameters and the token embeddings",
            "embedding": f"{self.clip.visual.proj.shape[1]} numbers",
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The resolved config travels with the weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["config"] = self.config

    def setup(self, stage: str) -> None:
        """Tokenises every distinct caption of the data once.

        Raises:
            AntherError: the images of the data are not of the model's size.
        """
        data = self._data()
        if data.image_shape != (3, self.size, self.size):
            raise AntherError(
                f"the data gives images of {data.image_shape} but the CLIP takes (3, {self.size}, {self.size}); make "
                "data.size and module.model_cfg.vision_cfg.image_size equal."
            )
        distinct = {caption: i for i, caption in enumerate(dict.fromkeys(data.table.captions))}
        self._tokens = tokenize(list(distinct), self.model_cfg)
        self._caption = torch.tensor([distinct[caption] for caption in data.table.captions])

    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _embed(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Unit image vectors (B, d), unit vectors of the n distinct captions (n, d), which caption is whose (B,)."""
        which, position = torch.unique(self._caption[batch["index"].cpu()], return_inverse=True)
        text = self.clip.encode_text(self._tokens[which].to(self.device), normalize=True)
        return self.clip.encode_image(batch["image"], normalize=True), text, position.to(self.device)

    def _loss(self, image: Tensor, text: Tensor, position: Tensor) -> Tensor:
        scale = self.clip.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        return soft_contrastive_loss(image.float(), text[position].float(), position[:, None] == position, scale).mean()

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a batch."""
        loss = self._loss(*self._embed(batch))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["index"]))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Loss and retrieval of a batch."""
        image, text, position = self._embed(batch)
        hits = (image @ text.T).argmax(1) == position
        self.val_loss.update(self._loss(image, text, position), len(hits))
        self.val_retrieval.update(hits.float())
        self.log_dict({"val/loss": self.val_loss, "val/retrieval": self.val_retrieval}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """What the config chose; only matrices that are no embeddings decay."""
        decayed = [p for n, p in self.clip.named_parameters() if p.ndim > 1 and "embedding" not in n]
        others = [p for n, p in self.clip.named_parameters() if p.ndim <= 1 or "embedding" in n]
        optimizer = self._make_optimizer([{"params": decayed}, {"params": others, "weight_decay": 0.0}])
        if self._make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._make_scheduler(optimizer, self.total_steps)}

    @torch.no_grad()
    def on_fit_end(self) -> None:
        """Brings both towers to one scale and writes the file."""
        if not self.trainer.is_global_zero:
            return
        data = self._data()
        # Only the words of training captions: every exported row of the embedding was trained.
        captions = sorted({data.table.captions[row] for row in data.splits["train"]})
        images = from_uint8(data.pixels("val"))
        self.eval()
        rescale(self.clip, images.to(self.device), tokenize(captions, self.model_cfg).to(self.device))
        path = Path(self.trainer.default_root_dir) / self.file_name
        export_clip(self.clip, self.model_cfg, captions, path, self.name)


def tokenize(captions: Sequence[str], model_cfg: Mapping[str, Any]) -> Tensor:
    """Token ids (n, context_length) by the tokenizer of `open_clip`."""
    from open_clip import SimpleTokenizer

    tokens: Tensor = SimpleTokenizer()(list(captions), context_length=int(model_cfg["text_cfg"]["context_length"]))
    return tokens


def rescale(clip: Any, images: Tensor, tokens: Tensor) -> None:
    """Scales both final projections so that embeddings have root-mean-square norm √d: entries near ±1.

    Cosines do not change, since the projections have no bias. Networks are conditioned on embeddings as they come, so
    their scale should not depend on how a training ran.

    Args:
        clip: changed in place; its towers end in `visual.proj` and `text_projection`.
        images: (n, 3, H, W) as the model takes them.
        tokens: (m, context_length).
    """
    for weight, embeddings in (
        (clip.visual.proj, clip.encode_image(images)),
        (clip.text_projection, clip.encode_text(tokens)),
    ):
        norm = embeddings.float().square().sum(1).mean().sqrt()
        weight.data.mul_(math.sqrt(embeddings.shape[1]) / norm)


def export_clip(clip: Any, model_cfg: Mapping[str, Any], captions: Sequence[str], path: Path | str, name: str) -> None:
    """Writes a CLIP with the token embeddings of the captions' vocabulary only, as float16 safetensors.

    Beside the state dict the file holds `token_ids`, int64 (V,): row r of `token_embedding.weight` belongs to token
    `token_ids[r]`. The metadata says the model config, the name, the preprocessing and the words.

    Args:
        clip: an `open_clip.CLIP`.
        model_cfg: its config.
        captions: whose words and tokens make the vocabulary.
        path: the file, replaced as a whole.
        name: of the model.
    """
    from safetensors.torch import save

    token_ids = torch.unique(tokenize(captions, model_cfg))
    state = {key: value.detach().cpu() for key, value in clip.state_dict().items()}
    state["token_embedding.weight"] = state["token_embedding.weight"][token_ids]
    tensors = {key: (v.half() if v.is_floating_point() else v).contiguous() for key, v in state.items()}
    size = int(model_cfg["vision_cfg"]["image_size"])
    words = sorted({word.strip(".").lower() for caption in captions for word in caption.split()})
    metadata = {
        "anther.clip": "1",
        "name": name,
        "model_cfg": json.dumps(
            {**model_cfg, "text_cfg": {**model_cfg["text_cfg"], "vocab_size": clip.token_embedding.num_embeddings}}
        ),
        "preprocess": json.dumps(
            {
                "mean": list(MEAN),
                "std": list(STD),
                "size": size,
                "interpolation": "bicubic",
                "resize_mode": "shortest",
            }
        ),
        "words": json.dumps(words),
    }
    with atomic(path) as temporary:
        temporary.write_bytes(save({**tensors, "token_ids": token_ids}, metadata))
