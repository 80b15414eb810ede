"""How many images per second the loader delivers, against what training consumes.

Drawn flowers decoded once to a uint8 table, then batches as `train_dataloader` gives them: shuffled, flipped and
cropped, float32. Training is the step of `benchmarks.train_step`'s bare loop, whose own batches are made beforehand, so
nothing of the loader is in it. One process, one thread, in turns; CPU seconds.

    python -m benchmarks.loader [network] [batch size]     network: demo (default), flowers
"""

import statistics
import sys
import time
from itertools import islice

import torch

from benchmarks.peers import T, make_network
from datamodules.augment import FlipCrop
from datamodules.drawn import DrawnFlowers
from diffusion.denoiser import Denoiser
from diffusion.modules.diffusion import TRAINING, draw_training
from diffusion.schedules import Linear

TURNS, BATCHES = 5, 32


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "demo"
    batch_size = int(sys.argv[2]) if len(sys.argv) > 2 else 32
    torch.set_num_threads(1)
    data = DrawnFlowers(seed=0, batch_size=batch_size, n_train=BATCHES * batch_size, n_val=32, augment=FlipCrop(0.5))
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    batch = next(iter(loader))["image"]
    denoiser = Denoiser(make_network(name), Linear(T))
    optimizer = torch.optim.Adam(denoiser.network.parameters(), lr=1e-4)
    delivered, consumed = [], []
    for turn in range(TURNS + 1):
        before = time.process_time()
        count = sum(len(part["image"]) for part in islice(loader, BATCHES))
        delivered.append(count / (time.process_time() - before))
        draws = draw_training((TRAINING, 0, turn), len(batch), range(len(batch)), batch.shape[1:], T, "stratified")
        before = time.process_time()
        optimizer.zero_grad()
        denoiser.loss(batch, draws.t, draws.eps).mean().backward()
        optimizer.step()
        consumed.append(len(batch) / (time.process_time() - before))
    # The first turn warms up.
    out, used = statistics.median(delivered[1:]), statistics.median(consumed[1:])
    print(f"network {name}, batch {batch_size}, one thread")
    print(f"{'loader':10}{out:10.0f} images per CPU second")
    print(f"{'training':10}{used:10.0f} images per CPU second")
    print(f"{'ratio':10}{out / used:10.0f}")


if __name__ == "__main__":
    main()
