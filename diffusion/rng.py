"""Generators by key: every draw of the project can be named and repeated."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion.devices import upload
from diffusion.errors import AntherError

# First number of the keys of a training, so that what they are for never shares a stream.
TRAINING, VALIDATION, LAYERS = 0, 1, 2


def generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of its key alone.

    Training draws with the key `(seed, step, place in the batch)`. Keys are hashed (numpy's SeedSequence), so
    neighbouring keys give unrelated streams and `(1, 2)` differs from `(2, 1)`. torch seeds a CPU generator by 32 bits:
    of n keys about n^2 / 2^33 pairs share a stream, 0.3 of them among 50,000 images.

    Args:
        key: non-negative integers.
    """
    # SeedSequence reads (1,), (1, 0) and (1, 0, 0) as one key, so the length goes in front.
    state = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def check_seed(seed: object) -> None:
    """Refuses what cannot seed every generator of a run.

    Raises:
        AntherError: no whole number from 0 to 2^32 - 1, the range of the libraries' own generators.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise AntherError(f"seed = {seed!r} is no whole number from 0 to {2**32 - 1}: choose one.")


class ImageRNG:
    """One generator per image, so seed k draws image k in any batch split and on any device.

    Draws are made on the CPU, the one device whose stream every machine has, and then moved.

    Args:
        seeds: one per image.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [generator(seed) for seed in seeds]

    def __len__(self) -> int:
        return len(self._generators)

    def randn(
        self, shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Standard normal noise, (len(self), *shape); each image draws from its own stream."""
        draws = [torch.randn(tuple(shape), generator=g, dtype=dtype) for g in self._generators]
        return upload(torch.stack(draws), torch.device(device))
