"""A real CLIP of open_clip, tiny and random, in the format of the project's own file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.base import ImageTable

WORDS = ["a", "photo", "of", "red", "rose", "two", "white", "daisies", ","]
CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
}
PREPROCESS = {
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
    "size": 16,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ANTHER_CACHE", str(folder))
    return folder


@pytest.fixture
def write_clip(tmp_path):
    """(name, seed) -> (path of a file in the project's format, the full open_clip model that it was cut from)."""

    def write(name="tiny", seed=0):
        import open_clip
        from safetensors.torch import save_file

        torch.manual_seed(seed)
        model = open_clip.CLIP(**json.loads(json.dumps(CONFIG))).eval()
        tokenizer = open_clip.SimpleTokenizer(context_length=16)
        ids = torch.tensor(sorted({t for w in WORDS for t in tokenizer.encode(w)} | {49406, 49407}))
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        state["token_embedding.weight"] = state["token_embedding.weight"][ids].contiguous()
        path = tmp_path / f"{name}-{seed}.safetensors"
        metadata = {"anther.clip": "1", "name": name}
        metadata |= {k: json.dumps(v) for k, v in (("model_cfg", CONFIG), ("preprocess", PREPROCESS), ("words", WORDS))}
        save_file({**state, "token_ids": ids}, path, metadata=metadata)
        return path, model

    return write


@pytest.fixture
def reference(write_clip):
    """(path, encode_images, encode_texts): the same model used the plain way of open_clip, one input at a time."""
    import open_clip
    from open_clip.transform import image_transform

    path, model = write_clip()
    kept = {k: PREPROCESS[k] for k in ("mean", "std", "interpolation", "resize_mode")}
    transform = image_transform(16, is_train=False, **kept)
    tokenizer = open_clip.SimpleTokenizer(context_length=16)

    def images(pictures):
        with torch.no_grad():
            return torch.cat([model.encode_image(transform(p)[None]) for p in pictures])

    def texts(prompts):
        with torch.no_grad():
            return torch.cat([model.encode_text(tokenizer([p])) for p in prompts])

    return Path(path), images, texts


@pytest.fixture
def make_table():
    """(n, seed) -> an ImageTable of random 20-pixel images in two classes."""

    def make(n=6, seed=0, digest=None):
        images = np.random.default_rng(seed).integers(0, 256, (n, 3, 20, 20), dtype=np.uint8)
        classes = ("daisy", "roses")
        labels = [k % 2 for k in range(n)]
        captions = ("two white daisies", "a photo of a red rose")
        return ImageTable(
            images,
            torch.tensor(labels),
            classes,
            tuple(f"{classes[c]}/{k}.jpg" for k, c in enumerate(labels)),
            tuple(captions[c] for c in labels),
            digest or f"digest-{n}-{seed}",
        )

    return make
