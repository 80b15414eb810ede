"""MNIST in its size and shape without its files: ten coarse patterns under noise, which a network learns in seconds."""

import numpy as np
import pytest

from datamodules.mnist import MNIST
from diffusion.evaluation import subject


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """MNIST reads the fake for the rest of a test; some digits are hidden by more noise than others."""
    rng = np.random.default_rng(0)
    n = 70_000
    labels = rng.integers(10, size=n).astype(np.uint8)
    patterns = np.kron(rng.integers(0, 2, (10, 7, 7)) * 255.0, np.ones((4, 4)))
    share = rng.uniform(0, 0.9, n).astype(np.float32)[:, None, None]
    noise = rng.integers(256, size=(n, 28, 28), dtype=np.uint8)
    images = ((1 - share) * patterns.astype(np.float32)[labels] + share * noise).astype(np.uint8)
    parts = {"train": slice(0, 60_000), "t10k": slice(60_000, n)}

    def read(self: MNIST, name: str) -> np.ndarray:
        which, what = name.removeprefix("mnist/").split("-")
        return (images if what == "images" else labels)[parts[which]]

    monkeypatch.setattr(MNIST, "_read", read)
    # Data that a test before or after this one has read are not these.
    monkeypatch.setattr(subject, "_build_data", subject._build_data.__wrapped__)
