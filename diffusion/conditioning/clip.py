"""CLIP embeddings as the condition."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffusion.conditioning.base import Conditioner, RowTable
from diffusion.conditioning.cache import cached
from diffusion.conditioning.openclip import ClipModel, ClipSource, clip_config, find_clip, load_clip
from diffusion.errors import AntherError

if TYPE_CHECKING:
    from datamodules.base import ImageTable

_CHUNK = 64


class Clip(Conditioner):
    """Trains on CLIP embeddings of the images or of their captions, and samples from embeddings of prompts.

    Embeddings are not normalised, as in the course model. They are computed once and cached by content; CLIP itself is
    in memory only while something is not in the cache yet.

    Args:
        model: see `load_clip`.
        pretrained: see `load_clip`.
        training: `image`: the embedding of the undecimated training image; needs no captions and relies on
            the space that CLIP's towers share. `text`: the embedding of its caption, so training and sampling see the
            same kind of vector.

    Reference: Radford et al., 2021, arXiv:2103.00020.
    """

    def __init__(self, model: str, pretrained: str, training: Literal["image", "text"] = "image") -> None:
        if training not in ("image", "text"):
            raise AntherError(f"conditioner.training={training} is not known; choose image or text.")
        self.model = model
        self.pretrained = pretrained
        self.training = training
        self._rows: RowTable | None = None
        self._prompts: dict[str, Tensor] = {}
        self._dim: int | None = None

    @property
    def dim(self) -> int:
        """CLIP's embedding width, read from the architecture alone."""
        if self._dim is None:
            self._dim = int(clip_config(self.model, self.pretrained)["embed_dim"])
        return self._dim

    def prepare(self, table: "ImageTable") -> None:
        """Embeds all rows, or reads their embeddings from the cache.

        Raises:
            AntherError: CLIP's weights are missing, or a caption uses words that it does not know.
        """
        source = find_clip(self.model, self.pretrained)
        if self.training == "image":
            key = {"images": table.digest, **source.identity}
            rows = cached(key, (len(table.names), self.dim), lambda: self._embed_images(table))
        else:
            texts = sorted(set(table.captions))
            position = {text: k for k, text in enumerate(texts)}
            rows = self._embed_texts(source, texts)[[position[caption] for caption in table.captions]]
        self._rows = RowTable(rows)

    def lookup(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (B, dim) of the rows `index` of the table given to `prepare`."""
        if self._rows is None:
            raise RuntimeError("Clip.lookup before Clip.prepare")
        return self._rows[batch["index"]]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (n, dim) of the prompts."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompts]
        if missing:
            rows = self._embed_texts(find_clip(self.model, self.pretrained), missing)
            self._prompts.update(zip(missing, rows, strict=True))
        return torch.stack([self._prompts[prompt] for prompt in prompts]) if prompts else torch.zeros(0, self.dim)

    @property
    def weights_hash(self) -> str:
        """sha256 of CLIP's weights file.

        Raises:
            AntherError: it is missing.
        """
        return find_clip(self.model, self.pretrained).weights_hash

    def describe(self) -> str:
        """Model, weights, of which a path would tell about this machine, and which tower is used when."""
        return (
            f"CLIP {self.model} ({Path(self.pretrained).name}), {self.dim} numbers: "
            f"{self.training} embeddings in training, text embeddings in sampling"
        )

    def _embed_texts(self, source: ClipSource, texts: Sequence[str]) -> Tensor:
        key = {"texts": list(texts), **source.identity}
        return cached(key, (len(texts), self.dim), lambda: self._load().encode_texts(texts))

    def _embed_images(self, table: "ImageTable") -> Tensor:
        from rich.progress import track

        clip = self._load()
        n = len(table.names)
        chunks = track(range(0, n, _CHUNK), f"CLIP embeddings of {n} images", disable=n <= _CHUNK)
        # By chunks, so that only these originals are decoded at a time.
        return torch.cat(
            [clip.encode_images([table.original(i) for i in range(k, min(k + _CHUNK, n))]).cpu() for k in chunks]
        )

    def _load(self) -> ClipModel:
        return load_clip(self.model, self.pretrained, self.device)
