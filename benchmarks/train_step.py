"""Images per second of this project's training, against the same training written the plain way.

    ours          `Trainer.fit` with what every experiment runs: our loader, noise by (seed, step, place), EMA, gradient
                  clipping, the guard against NaN, progress, logging, and freed memory that the process keeps
    ours, bf16    the same with trainer.precision=bf16-mixed, where this CPU multiplies in bf16
    bare loop     the step of ours without Lightning, callbacks and logging: the same loader, draws, loss, layout,
                  memory, clipping, Adam and EMA
    notebook      the course's loop: contiguous float32, Adam
    diffusers     the loop of diffusers' `train_unconditional.py`

All on the same network (the last two with the network as the published code computes it), images and batch, on one
thread, in turns of a few steps; seconds are CPU seconds, since machines are shared. The last two have a process of
their own, since what ours sets for a whole process would help them too. That the losses agree is looked at first. The
matrix product is the fastest of torch's two of 2048 x 2048 in float32, in the same process as ours; the share of it
that a step gets counts the arithmetic of the network as published, three times its forward pass.

    python -m benchmarks.train_step [network] [batch size]     network: demo (default), flowers, mnist
"""

import ctypes
import logging
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.apart import Apart, timed
from benchmarks.peers import Diffusers, Notebook, PlainUNet, T, make_network
from callbacks.ema import EMA
from callbacks.nan_guard import NanGuard
from callbacks.progress import ProgressLines
from callbacks.record import RunRecord
from callbacks.throughput import Throughput
from datamodules.drawn import DrawnFlowers
from diffusion.allocator import keep_freed_memory
from diffusion.denoiser import Denoiser
from diffusion.images import from_uint8
from diffusion.loggers import CSVLog
from diffusion.modules.diffusion import TRAINING, Diffusion, draw_training
from diffusion.networks.layout import lay_out
from diffusion.samplers import DDPM
from diffusion.schedules import Linear

SECONDS = 2.0  # of a turn, as near as whole steps allow
TURNS = 6


class Fit(lightning.Callback):
    """`Trainer.fit` that stops after each turn until it is asked for the next; it lives on a thread of its own."""

    def __init__(self, module: Diffusion, data: DrawnFlowers, folder: Path, precision: Any = "32-true") -> None:
        self._left = 0
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._trainer = lightning.Trainer(
            accelerator="cpu",
            precision=precision,
            max_steps=10**9,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[EMA(), NanGuard(), Throughput(), RunRecord(), ProgressLines(1e9), self],
            logger=CSVLog(folder / f"{precision}.csv"),
        )
        self._thread = threading.Thread(target=self._fit, args=(module, data), daemon=True)

    def _fit(self, module: Diffusion, data: DrawnFlowers) -> None:
        torch.set_num_threads(1)
        self._trainer.fit(module, data)
        self._done.release()

    def run(self, steps: int) -> None:
        """So many steps."""
        self._left = steps
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._done.acquire()

    def end(self) -> None:
        """Lets the fit end."""
        self._trainer.should_stop = True
        self.run(1)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._left -= 1
        if self._left == 0 and not trainer.should_stop:
            self._done.release()
            self._go.acquire()


class Bare:
    """The step of ours by hand."""

    def __init__(self, denoiser: Denoiser, data: DrawnFlowers) -> None:
        self.denoiser, self.data = denoiser, data
        lay_out(denoiser.network, torch.device("cpu"), "32-true")
        self.parameters = list(denoiser.network.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-4)
        self.average = [p.detach().clone() for p in self.parameters]
        self.update = get_ema_multi_avg_fn(0.9999)
        self.loader = data.train_dataloader()
        self.batches, self.steps = iter(self.loader), 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = next(self.batches, None)
            if batch is None:
                self.batches = iter(self.loader)
                batch = next(self.batches)
            x_0 = batch["image"]
            n = len(x_0)
            draws = draw_training((TRAINING, 0, self.steps), n, range(n), x_0.shape[1:], T, "stratified")
            self.optimizer.zero_grad()
            self.denoiser.loss(x_0, draws.t, draws.eps).mean().backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            with torch.no_grad():
                self.update(self.average, self.parameters, 1)
            self.steps += 1


def has_bf16() -> bool:
    """Whether the CPU multiplies in bf16; without that it is only slower."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class MatrixProduct:
    """FLOP per CPU second in float32, by BLAS and by oneDNN: on AMD's processors they differ by a factor of two."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it still works
            from torch.utils.mkldnn import to_mkldnn

        a = torch.randn(2048, 2048)
        linear = to_mkldnn(torch.nn.Linear(2048, 2048, bias=False))
        self.ways: list[Callable[[], Any]] = [lambda: a @ a, partial(linear, a.to_mkldnn())]

    def rate(self) -> float:
        """The faster one's best of three."""
        seconds = []
        for way in self.ways * 3:
            before = time.process_time()
            way()
            seconds.append(time.process_time() - before)
        return 2 * 2048**3 / min(seconds)


def make_peers(name: str, images: torch.Tensor, batch_size: int) -> dict[str, Any]:
    """The loops that ours is measured against."""
    kinds = {"notebook": Notebook, "diffusers": Diffusers}
    return {key: kind(make_network(name, PlainUNet), images, batch_size) for key, kind in kinds.items()}


def one_arena() -> None:
    """Has the threads that fit here use the main thread's heap, as a run's fit does on the main thread."""
    arena_max = -8
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(arena_max, 1)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "demo"
    batch_size = int(sys.argv[2]) if len(sys.argv) > 2 else 32
    torch.set_num_threads(1)
    keep_freed_memory()
    one_arena()
    warnings.filterwarnings("ignore", module="lightning.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = DrawnFlowers(seed=0, batch_size=batch_size, n_train=1024, n_val=32)
    data.prepare_data()
    data.setup("fit")
    images = from_uint8(torch.from_numpy(data.table.images[data.splits["train"]].copy()))

    def ours() -> Denoiser:
        return Denoiser(make_network(name), Linear(T))

    x_0, t, eps = images[:4], torch.tensor([0, 7, 200, 399]), torch.randn(4, 3, 32, 32)
    loss = ours().loss(x_0, (t + 1).double() / T, eps).mean()
    peers = make_peers(name, images, batch_size)
    for peer in peers.values():
        assert torch.allclose(loss, peer.loss(x_0, t, eps), rtol=1e-5), (loss, peer.loss(x_0, t, eps))
    network = peers["notebook"].network
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x_0, (t + 1) / T)
    flop = 3 * counter.get_total_flops() / len(x_0) * batch_size

    with tempfile.TemporaryDirectory() as folder:

        def fit(precision: str) -> Fit:
            return Fit(Diffusion(ours(), DDPM(), partial(torch.optim.Adam, lr=1e-4)), data, Path(folder), precision)

        fits = {"ours": fit("32-true")} | ({"ours, bf16": fit("bf16-mixed")} if has_bf16() else {})
        runs: dict[str, Callable[[int], None]] = {side: one.run for side, one in fits.items()}
        runs["bare loop"] = Bare(ours(), data).run
        apart = Apart(make_peers, name, images, batch_size)
        sides: dict[str, Callable[[int], float]] = {
            **{side: lambda steps, run=run: timed(run, steps)[0] / steps for side, run in runs.items()},
            **{side: lambda steps, side=side: apart.timed(side, "run", steps)[0] / steps for side in peers},
        }
        first = {side: turn(1) for side, turn in sides.items()}  # warms up, too
        steps = max(1, round(SECONDS / statistics.median(first.values())))
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        product, peaks = MatrixProduct(), []
        for _ in range(TURNS):
            for side, turn in sides.items():
                seconds[side].append(turn(steps))
            peaks.append(product.rate())
        apart.end()
        for one in fits.values():
            one.end()

    parameters = sum(p.numel() for p in network.parameters())
    print(f"network {name} ({parameters:,} parameters), batch {batch_size}, one thread, {TURNS} turns of {steps} steps")
    print(f"{'':14}{'images per CPU second':>22}{'ours is faster by':>20}{'share of matrix product':>26}")
    for side, values in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], values, strict=True))
        share = statistics.median(flop / s / peak for s, peak in zip(values, peaks, strict=True))
        print(f"{side:14}{batch_size / statistics.median(values):22.2f}{ratio:20.3f}{share:26.0%}")
    print(f"matrix product {statistics.median(peaks) / 1e9:.0f} GFLOP per CPU second in float32")


if __name__ == "__main__":
    main()
