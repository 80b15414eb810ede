"""Embeddings that are computed once and found again by what they were computed from."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.assets import cache_dir
from diffusion.errors import AntherError
from diffusion.files import atomic

log = logging.getLogger(__name__)


def cache_path(key: Mapping[str, Any]) -> Path:
    """The file of a key: its name is the hash of everything that the embeddings depend on."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "embeddings" / f"{digest}.safetensors"


def cached(key: Mapping[str, Any], shape: tuple[int, int], compute: Callable[[], Tensor]) -> Tensor:
    """Reads embeddings from the cache, or computes and stores them.

    A stored file that is broken, of another shape or not finite is computed again, with a notice.

    Args:
        key: JSON values that name all inputs: content of the data, weights, model configuration, preprocessing.
        shape: (rows, dim).
        compute: makes the embeddings.

    Returns:
        float32 (rows, dim) on the CPU.

    Raises:
        AntherError: the computed embeddings are not finite, or the cache folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    path = cache_path(key)
    if path.exists():
        try:
            rows = load_file(path)["embedding"]
            if rows.shape == shape and rows.dtype == torch.float32 and rows.isfinite().all():
                return rows
        except (SafetensorError, OSError, KeyError):
            pass
        log.warning("the cached embeddings %s are damaged and are computed again", path)
    rows = compute().detach().float().cpu().contiguous()
    if rows.shape != shape:
        raise ValueError(f"expected embeddings {shape}, computed {tuple(rows.shape)}")
    bad = (~rows.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise AntherError(
            f"the embeddings of {len(bad)} of {shape[0]} rows are not finite (first: row {bad[0]}); "
            "the weights of the conditioner are damaged, fetch them again."
        )
    with atomic(path) as temporary:
        save_file({"embedding": rows}, temporary, metadata={"key": json.dumps(key, sort_keys=True)})
    return rows
