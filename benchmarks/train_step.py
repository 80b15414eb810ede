"""Images per second of this project's training against the plain way of writing it.

The plain way is the loop of the course's notebooks: contiguous float32, a DataLoader over tensors, uniform times, noise
from the global generator, mean squared error, Adam. Ours is `Trainer.fit` on the same network, images and batch size,
with our loader, noise by (seed, rank, step), EMA, gradient clipping and logging. Both run in one process in turns of a
few steps; seconds are CPU seconds of the process, since machines are shared. The two losses are compared first.

    python -m benchmarks.train_step [network] [batch size]     network: demo (default), flowers, mnist
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from callbacks.ema import EMA
from datamodules.drawn import DrawnFlowers
from diffusion.denoiser import Denoiser
from diffusion.images import from_uint8
from diffusion.loggers import CSVLog
from diffusion.modules.diffusion import Diffusion
from diffusion.networks.unet import UNet
from diffusion.samplers import DDPM
from diffusion.schedules import Linear

T, TURN, TURNS = 400, 4, 8


def make_network(name: str) -> UNet:
    """The network of conf/network/<name>.yaml for drawn flowers."""
    node = yaml.safe_load((Path(__file__).parents[1] / "conf" / "network" / f"{name}.yaml").read_text())
    del node["_target_"]
    torch.manual_seed(0)
    return UNet(**{**node, "T": T, "img_ch": 3, "img_size": 32})


class PlainLoop:
    """The notebook's loop, `steps` at a time."""

    def __init__(self, network: UNet, images: Tensor, batch_size: int) -> None:
        beta = torch.linspace(1e-4, 0.02, T)
        abar = torch.cumprod(1 - beta, 0)
        self.signal, self.noise = abar.sqrt(), (1 - abar).sqrt()
        self.network, self.optimizer = network, torch.optim.Adam(network.parameters(), lr=1e-4)
        self.loader = DataLoader(TensorDataset(images), batch_size, shuffle=True, drop_last=True)
        self.batches = self._forever()

    def _forever(self) -> Iterator[Tensor]:
        while True:
            for (images,) in self.loader:
                yield images

    def loss(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        x_t = self.signal[t].view(-1, 1, 1, 1) * x_0 + self.noise[t].view(-1, 1, 1, 1) * eps
        # The network counts time from 1 to T where the notebook counts from 0.
        return F.mse_loss(eps, self.network(x_t, (t + 1) / T))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            x_0 = next(self.batches)
            self.optimizer.zero_grad()
            self.loss(x_0, torch.randint(0, T, (len(x_0),)), torch.randn_like(x_0)).backward()
            self.optimizer.step()


class Turns(lightning.Callback):
    """Lets the plain loop run between turns of ours, and times both."""

    def __init__(self, plain: PlainLoop) -> None:
        self.plain = plain
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._started = time.process_time()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % TURN:
            return
        self.ours.append(time.process_time() - self._started)
        before = time.process_time()
        self.plain.run(TURN)
        self._started = time.process_time()
        self.theirs.append(self._started - before)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "demo"
    batch_size = int(sys.argv[2]) if len(sys.argv) > 2 else 32
    data = DrawnFlowers(seed=0, batch_size=batch_size, n_train=1024, n_val=32)
    data.prepare_data()
    data.setup("fit")
    images = from_uint8(torch.from_numpy(data.table.images[data.splits["train"]].copy()))

    plain = PlainLoop(make_network(name), images, batch_size)
    denoiser = Denoiser(make_network(name), Linear(T))
    x_0, t, eps = images[:4], torch.tensor([0, 7, 200, 399]), torch.randn(4, 3, 32, 32)
    ours, theirs = denoiser.loss(x_0, (t + 1).double() / T, eps).mean(), plain.loss(x_0, t, eps)
    assert torch.allclose(ours, theirs, rtol=1e-5), (ours, theirs)

    turns = Turns(plain)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=TURN * (TURNS + 1),
            limit_val_batches=0,
            gradient_clip_val=1.0,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[EMA(), turns],
            logger=CSVLog(Path(folder) / "metrics.csv"),
        )
        trainer.fit(Diffusion(denoiser, DDPM(), partial(torch.optim.Adam, lr=1e-4)), data)

    # The first turn warms up.
    pairs = list(zip(turns.ours, turns.theirs, strict=True))[1:]
    speed_ours = TURN * batch_size / statistics.median(a for a, _ in pairs)
    speed_theirs = TURN * batch_size / statistics.median(b for _, b in pairs)
    ratio = statistics.median(b / a for a, b in pairs)
    parameters = sum(p.numel() for p in nn.Module.parameters(denoiser.network))
    print(f"network {name} ({parameters:,} parameters), batch {batch_size}, {torch.get_num_threads()} threads")
    print(f"{'ours':12}{speed_ours:8.2f} images per CPU second")
    print(f"{'plain loop':12}{speed_theirs:8.2f} images per CPU second")
    print(f"{'ratio':12}{ratio:8.3f}")


if __name__ == "__main__":
    main()
