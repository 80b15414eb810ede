"""How many images per second the loader delivers, against what training consumes.

Drawn flowers in a memory-mapped uint8 table, then batches as `train_dataloader` gives them: shuffled, flipped and
cropped, float32. The table has 36 pixels for images of 32, as in experiment=flowers_small, and 255 MB, more than the
caches of a CPU; its rows repeat a few drawings. A turn is an epoch, so its order and draws are counted. Training is the
plain loop's step, without clipping and averaging, so a little faster than ours; its batches are made beforehand, and
nothing of the loader is in it. One process, one thread, in turns; CPU seconds.

    python -m benchmarks.loader [network] [batch size]     network: demo (default), flowers
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers import T, make_network
from benchmarks.where import print_where
from datamodules.augment import FlipCrop
from datamodules.base import EpochSampler, ImageDataModule, ImageTable
from datamodules.drawn import draw
from diffusion.denoiser import Denoiser
from diffusion.modules.diffusion import draw_training
from diffusion.rng import TRAINING
from diffusion.schedules import Linear

TURNS = 5
SIDE, STORED = 32, 36
DRAWN, REPEATS = 1024, 64


class Repeated(ImageDataModule):
    """A few drawings, many times over."""

    def __init__(self, path: Path, batch_size: int) -> None:
        super().__init__(
            name="repeated drawings",
            image_shape=(3, SIDE, SIDE),
            batch_size=batch_size,
            seed=0,
            augment=FlipCrop(0.5),
        )
        self.path = path

    def prepare_data(self) -> None:
        drawings = np.stack([draw(0, k, STORED)[0] for k in range(DRAWN)])
        np.save(self.path, np.tile(drawings, (REPEATS, 1, 1, 1)))

    def load(self) -> ImageTable:
        images = np.load(self.path, mmap_mode="r")
        names = tuple(map(str, range(len(images))))
        return ImageTable(images, torch.zeros(len(images), dtype=torch.long), ("flower",), names, names, "repeated")


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "demo"
    batch_size = int(sys.argv[2]) if len(sys.argv) > 2 else 32
    torch.set_num_threads(1)
    print_where()
    with tempfile.TemporaryDirectory() as folder:
        measure(name, batch_size, Path(folder) / "table.npy")


def measure(name: str, batch_size: int, path: Path) -> None:
    data = Repeated(path, batch_size)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    batch = next(iter(loader))["image"]
    assert batch.shape[-1] == SIDE < data.table.images.shape[-1]
    assert isinstance(loader.sampler, EpochSampler)
    denoiser = Denoiser(make_network(name), Linear(T))
    optimizer = torch.optim.Adam(denoiser.network.parameters(), lr=1e-4)
    delivered, consumed = [], []
    for turn in range(TURNS + 1):
        loader.sampler.set_epoch(turn)
        before = time.process_time()
        count = sum(len(part["image"]) for part in loader)
        delivered.append(count / (time.process_time() - before))
        draws = draw_training((TRAINING, 0, turn), len(batch), range(len(batch)), batch.shape[1:], T, "stratified")
        before = time.process_time()
        optimizer.zero_grad()
        denoiser.loss(batch, draws.t, draws.eps).mean().backward()
        optimizer.step()
        consumed.append(len(batch) / (time.process_time() - before))
    # The first turn warms up.
    out, used = statistics.median(delivered[1:]), statistics.median(consumed[1:])
    megabytes = data.table.images.nbytes / 1e6
    print(f"network {name}, batch {batch_size}, one thread, table of {len(data.table):,} images, {megabytes:.0f} MB")
    print(f"{'loader':10}{out:10.0f} images per CPU second")
    print(f"{'training':10}{used:10.0f} images per CPU second")
    print(f"{'ratio':10}{out / used:10.0f}")


if __name__ == "__main__":
    main()
