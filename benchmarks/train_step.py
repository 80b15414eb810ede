"""Images per second of this project's training, against the same training written the plain way.

    ours                       `Trainer.fit` by trainer, callbacks, log and loader of `train.py experiment=<network>`,
                               with noise by (seed, step, place), and freed memory that the process keeps
    bare loop                  the step of ours without Lightning, callbacks and log: the same loader, draws, loss,
                               layout, memory, clipping, Adam and EMA
    ours, bf16                 ours with trainer.precision=bf16-mixed, where this CPU multiplies in bf16
    ours, allocator untouched  ours in a process with glibc's allocator as it comes, as the peers have it
    notebook                   the course's loop: contiguous float32, Adam
    diffusers                  the loop of diffusers' `train_unconditional.py`

All on the same network (the last two with the network as the published code computes it), images and batch, on one
thread, in turns of a few steps; seconds are CPU seconds, since machines are shared. Ours and the bare loop share a
process; the last two have another, since what ours sets for a whole process would help them too, and the other rows of
ours have one each. What the code alone wins over a peer is its factor over that of `ours, allocator untouched`. That
the losses and their gradients agree is looked at first. The matrix product is the fastest of torch's two of 2048 x 2048
in float32, in the same process as ours; the share of it that a step gets counts the arithmetic of the network as
published, three times its forward pass, of which ours does 0.96 (flowers).

Ours differs from the experiment in this: drawn flowers are its images; its model has no condition, as the peers' has
none, so that nothing is drawn from prompts, and the callback `clip`, which does nothing within an epoch, is left out;
Adam has a constant rate; the lines of progress are not printed; and a turn of fewer steps than
trainer.log_every_n_steps logs once. Validations and the drawing at the end of a fit are no part of a step: there are
none, though all callbacks that would take part are there. `last.ckpt` follows its own rule, after which hardly a turn
holds a save. So saves are timed between turns, and a step bears its part of the one that a run makes after each epoch
of these images, or after `every_n_steps`; where that is more than `share` of the time, a run leaves some out.

On a busy machine a turn is off by some per cent, and the median of a few turns by half of that: a difference of 1.03 is
seen where the turns agree, or over several runs.

On a GPU, if there is one, seconds are the clock's, ours is what `trainer=gpu` trains, the bare loop is in bf16 too, the
matrix product is of 8192 x 8192 in bf16, and there are a row of ours in float32 and one of diffusers with its
`--mixed_precision=bf16`, instead of those of bf16 and of the allocator.

    python -m benchmarks.train_step [network] [batch size] [--turns 6] [--peers] [--device cpu]

network: demo (default), flowers

With `--peers` the other rows of ours are left out: each takes as much memory as ours, and flowers at 128 takes 9 GB.
"""

import argparse
import ctypes
import logging
import math
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
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.apart import Apart, timed
from benchmarks.peers import CONF, Diffusers, Notebook, PlainUNet, T, make_network
from benchmarks.where import device_option, print_where
from callbacks.checkpoints import LastCheckpoint
from callbacks.progress import ProgressLines
from callbacks.samples import SampleGrid
from datamodules.drawn import DrawnFlowers
from diffusion import settings
from diffusion.allocator import keep_freed_memory
from diffusion.build import build
from diffusion.denoiser import Denoiser
from diffusion.devices import upload
from diffusion.fabric import set_precision
from diffusion.images import from_uint8
from diffusion.modules.diffusion import Diffusion, draw_training
from diffusion.networks.layout import lay_out
from diffusion.rng import TRAINING, generator
from diffusion.samplers import DDPM
from diffusion.schedules import Linear
from diffusion.training import _parts

SECONDS = 2.0  # of a turn, as near as whole steps allow
SAVES = 3
PEERS: dict[str, Any] = {"notebook": Notebook, "diffusers": Diffusers}


def composed(
    name: str, batch_size: int, folder: Path, precision: str = "32-true", device: str = "cpu"
) -> dict[str, Any]:
    """The config of `train.py experiment=<name>`, with what must differ."""
    words = [
        f"experiment={name}",
        "data=embedded",
        f"data.batch_size={batch_size}",
        "module=unconditional",
        "guidance.weight=null",
        "callbacks.progress._target_=callbacks.progress.ProgressLines",
        "callbacks.samples.prompts=null",
        "callbacks.samples.weights=null",
        f"trainer.accelerator={device}",
        f"trainer.precision={precision}",
        "trainer.max_epochs=-1",
        f"trainer.max_steps={10**9}",
        "trainer.limit_val_batches=0",
        f"hydra.runtime.output_dir={folder}",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", words, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)  # for what the config says of the folder of the run
    config = settings.read(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), settings.Train)
    config["callbacks"].pop("clip", None)
    return config


def make_data(config: dict[str, Any]) -> DrawnFlowers:
    data: DrawnFlowers = build(config["data"], "data")
    data.prepare_data()
    data.setup("fit")
    return data


class Fit(lightning.Callback):
    """`Trainer.fit` that stops after each turn until it is asked for the next; it lives on a thread of its own."""

    def __init__(self, name: str, batch_size: int, folder: Path, precision: str, device: str) -> None:
        self._left = 0
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        config = composed(name, batch_size, folder, precision, device)
        self._device = device
        self._data = make_data(config)
        self._module = Diffusion(Denoiser(make_network(name), Linear(T)), DDPM(), partial(torch.optim.Adam, lr=1e-4))
        self._module.config = config
        parts = [*_parts(config, "callbacks"), self]
        self._trainer = build(config["trainer"], "trainer", callbacks=parts, logger=_parts(config, "logger"))
        set_precision(precision)
        # It is of the whole process: the other sides' turns have torch's own.
        self._deterministic = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("default")
        torch.utils.deterministic.fill_uninitialized_memory = False  # as train.py sets it
        self._log_every: int = self._trainer.log_every_n_steps
        next(part for part in parts if isinstance(part, ProgressLines)).disable()
        self._last = next(part for part in parts if isinstance(part, LastCheckpoint))
        self._thread = threading.Thread(target=self._fit, daemon=True)

    def _fit(self) -> None:
        torch.set_num_threads(1)
        self._trainer.fit(self._module, self._data)
        self._done.release()

    def check(self, expected: list[float], tolerance: float) -> None:
        """Holds loss and gradient on the probe, in the arithmetic of the fit, against those of the bare loop."""
        x_0, t, eps = probe(self._data.pixels("train"), self._device)
        self._module.to(self._device)
        with self._trainer.precision_plugin.forward_context():
            loss = self._module.denoiser.loss(x_0, (t + 1).double() / T, eps).mean()
        assert_near(loss_and_gradients(loss, self._module.denoiser.network), expected, tolerance)

    def run(self, steps: int) -> None:
        """So many steps."""
        self._left = steps
        self._trainer.log_every_n_steps = min(self._log_every, steps)
        torch.set_deterministic_debug_mode(self._deterministic)
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._done.acquire()
        torch.set_deterministic_debug_mode("default")

    def save(self) -> float:
        """What `LastCheckpoint` does when it is due, between two turns; seconds with those of the disk."""
        before = time.monotonic()
        self._last._save(self._trainer)
        return time.monotonic() - before

    @property
    def steps_between_saves(self) -> int:
        """As long as saves take no more than their share of the time."""
        return min(len(self._data.train_dataloader()), self._last.every_n_steps)

    def end(self) -> None:
        """Lets the fit end, without the pictures of a run's end."""
        self._trainer.callbacks = [part for part in self._trainer.callbacks if not isinstance(part, SampleGrid)]
        self._trainer.should_stop = True
        self.run(1)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._left -= 1
        if self._left == 0 and not trainer.should_stop:
            self._done.release()
            self._go.acquire()


class Bare:
    """The step of ours by hand."""

    def __init__(self, denoiser: Denoiser, data: DrawnFlowers, precision: str, device: str) -> None:
        self.denoiser, self.data = denoiser.to(device), data
        self.device, self.bf16 = device, precision == "bf16-mixed"
        lay_out(denoiser.network, torch.device(device), precision)
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
            x_0 = batch["image"].to(self.device, non_blocking=True)
            n = len(x_0)
            draws = draw_training((TRAINING, 0, self.steps), n, range(n), x_0.shape[1:], T, "stratified")
            self.optimizer.zero_grad()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                loss = self.denoiser.loss(x_0, draws.t, upload(draws.eps, x_0.device)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            with torch.no_grad():
                self.update(self.average, self.parameters, 1)
            self.steps += 1


def has_bf16() -> bool:
    """Whether the CPU multiplies in bf16; without that it is only slower."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class MatrixProduct:
    """FLOP per second: on a CPU in float32, by BLAS and by oneDNN, which on AMD's differ by two; on a GPU in bf16."""

    def __init__(self, device: str) -> None:
        self.device, self.size = device, 2048 if device == "cpu" else 8192
        if device != "cpu":
            a = torch.randn(self.size, self.size, device=device, dtype=torch.bfloat16)
            self.ways: list[Callable[[], Any]] = [lambda: a @ a]
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it still works
            from torch.utils.mkldnn import to_mkldnn

        a = torch.randn(self.size, self.size)
        linear = to_mkldnn(torch.nn.Linear(self.size, self.size, bias=False))
        self.ways = [lambda: a @ a, partial(linear, a.to_mkldnn())]

    def rate(self) -> float:
        """The faster one's best of three."""
        return 2 * self.size**3 / min(timed(way, device=self.device)[0] for way in self.ways * 3)


def probe(images: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A few images, times as the peers count them, and noise: all sides have the same loss there."""
    t, eps = torch.tensor([0, 7, 200, 399]), torch.randn(4, 3, 32, 32, generator=generator(0))
    return from_uint8(images[:4]).to(device), t.to(device), eps.to(device)


def loss_and_gradients(loss: torch.Tensor, network: torch.nn.Module) -> list[float]:
    """A loss and the norm of its gradient in each parameter of a network, where they are cleared again."""
    loss.backward()
    norms = [p.grad.norm().item() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    return [loss.item(), *norms]


def assert_near(values: list[float], expected: list[float], tolerance: float) -> None:
    """Sees that losses and gradients are the same, small gradients to the same part of the largest."""
    near = (
        math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance * max(expected))
        for a, b in zip(values, expected, strict=True)
    )
    assert all(near), (values, expected)


def make_peers(name: str, batch_size: int, folder: Path, expected: list[float], device: str) -> dict[str, Any]:
    """The loops that ours is measured against, after a look at their loss and gradient on the probe."""
    images = make_data(composed(name, batch_size, folder)).pixels("train")
    peers = {
        side: kind(make_network(name, PlainUNet), from_uint8(images), batch_size, device)
        for side, kind in sides_of_peers(device).items()
    }
    for side, peer in peers.items():
        theirs = loss_and_gradients(peer.loss(*probe(images, device)), peer.network)
        assert_near(theirs, expected, tolerance("bf16-mixed" if side == "diffusers, bf16" else "32-true", device))
    return peers


def sides_of_peers(device: str) -> dict[str, Any]:
    return PEERS | ({} if device == "cpu" else {"diffusers, bf16": partial(Diffusers, bf16=True)})


def tolerance(precision: str, device: str) -> float:
    """Of losses on the probe, and of the norms of their gradients; peers convolve in TF32 on a GPU, torch's default."""
    return 1e-5 if precision == "32-true" and device == "cpu" else 1e-2


def make_ours(
    name: str, batch_size: int, folder: Path, precision: str, keep: bool, expected: list[float], device: str
) -> dict[str, Any]:
    """Ours, for a process that keeps freed memory or not, after a look at its loss and gradient on the probe."""
    be_quiet()
    one_arena()
    if keep:
        keep_freed_memory()
    fit = Fit(name, batch_size, folder, precision, device)
    fit.check(expected, tolerance(precision, device))
    return {"ours": fit}


def one_arena() -> None:
    """Has the threads that fit here use the main thread's heap, as a run's fit does on the main thread."""
    arena_max = -8
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(arena_max, 1)


def be_quiet() -> None:
    """Without Lightning's device list and advice."""
    warnings.filterwarnings("ignore", module="lightning.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step")
    parser.add_argument("network", nargs="?", default="demo", help="demo (default), flowers")
    parser.add_argument("batch_size", nargs="?", type=int, default=32)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--peers", action="store_true", help="without the other rows of ours, which take memory")
    device_option(parser)
    options = parser.parse_args()
    print_where("lightning", "diffusers", device=options.device)
    torch.set_num_threads(1)
    keep_freed_memory()
    one_arena()
    be_quiet()
    with tempfile.TemporaryDirectory() as folder:
        measure(options.network, options.batch_size, options.turns, options.peers, options.device, Path(folder))


def measure(name: str, batch_size: int, turns: int, peers_alone: bool, device: str, folder: Path) -> None:
    data = make_data(composed(name, batch_size, folder))
    # Nothing else in this process: what lies in a heap can move the time of all that works in it by some per cent.
    precision = "32-true" if device == "cpu" else "bf16-mixed"  # of trainer=gpu
    ours = Fit(name, batch_size, folder / "ours", precision, device)
    bare = Bare(Denoiser(make_network(name), Linear(T)), data, precision, device)
    x_0, t, eps = probe(data.pixels("train"), device)
    loss = bare.denoiser.loss(x_0, (t + 1).double() / T, eps).mean()
    expected = loss_and_gradients(loss, bare.denoiser.network)
    ours.check(expected, tolerance(precision, device))
    peers = Apart(make_peers, name, batch_size, folder / "peers", expected, device, device=device)
    if device != "cpu":
        kinds = {"ours, float32": ("float32", "32-true", True)}
    else:
        kinds = {"ours, bf16": ("bf16", "bf16-mixed", True)} if has_bf16() else {}
        kinds["ours, allocator untouched"] = ("untouched", "32-true", False)
    others = {
        side: Apart(make_ours, name, batch_size, folder / part, its, keep, expected, device, device=device)
        for side, (part, its, keep) in ({} if peers_alone else kinds).items()
    }
    sides: dict[str, Callable[[int], float]] = {
        "ours": lambda steps: timed(ours.run, steps, device=device)[0] / steps,
        "bare loop": lambda steps: timed(bare.run, steps, device=device)[0] / steps,
        **{side: lambda steps, one=one: one.timed("ours", "run", steps)[0] / steps for side, one in others.items()},
        **{
            side: lambda steps, side=side: peers.timed(side, "run", steps)[0] / steps for side in sides_of_peers(device)
        },
    }
    first = {side: [turn(1) for _ in range(2)][1] for side, turn in sides.items()}  # the first of all warms up
    steps = max(1, round(SECONDS / statistics.median(first.values())))
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    product, peaks = MatrixProduct(device), []
    for k in range(turns):
        # There and back: a machine that grows slower or faster favours nobody.
        for side, turn in list(sides.items())[:: -1 if k % 2 else 1]:
            seconds[side].append(turn(steps))
        peaks.append(product.rate())
    between, saves = ours.steps_between_saves, [timed(ours.save, device=device) for _ in range(SAVES)]
    peers.end()
    for one in others.values():
        one.timed("ours", "end")
        one.end()
    ours.end()

    network = make_network(name, PlainUNet)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x_0.cpu(), (t.cpu() + 1) / T)
    flop = 3 * counter.get_total_flops() / len(x_0) * batch_size
    parameters = sum(p.numel() for p in network.parameters())
    print(f"network {name} ({parameters:,} parameters), batch {batch_size}, one thread, {turns} turns of {steps} steps")
    per = "CPU second" if device == "cpu" else "second"
    print(f"{'':26}{f'images per {per}':>22}{'ours is faster by':>32}{'share of matrix product':>26}")
    for side, values in seconds.items():
        ratios = [b / a for a, b in zip(seconds["ours"], values, strict=True)]
        by_turns = f"({min(ratios):.2f} to {max(ratios):.2f})"
        share = statistics.median(flop / s / peak for s, peak in zip(values, peaks, strict=True))
        rate = batch_size / statistics.median(values)
        print(f"{side:26}{rate:22.2f}{statistics.median(ratios):16.3f} {by_turns:15}{share:26.0%}")
    kind = "float32" if device == "cpu" else "bf16"
    print(f"matrix product {statistics.median(peaks) / 1e9:.0f} GFLOP per {per} in {kind}")
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["bare loop"], strict=True)]
    over, low, high = statistics.median(ratios), min(ratios), max(ratios)
    save, waited = (statistics.median(values) for values in zip(*saves, strict=True))
    saving = 1 + save / between / statistics.median(seconds["ours"])
    print(f"ours over the bare loop {over:.3f} ({low:.3f} to {high:.3f} by turns), {over * saving:.3f} with saves:")
    print(f"one of last.ckpt every {between} steps takes {save:.2f} {per}s, {waited:.2f} with the disk's")


if __name__ == "__main__":
    main()
