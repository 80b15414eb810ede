"""Guided sampling against the published way and against diffusers' scheduler loop: the same images, and how fast.

    ours         as `Diffusion.sample` does it: the encoder and the half of a convolution over a skip once for both
                 branches, doubled maps never made
    ours, bf16   the same under autocast, where this CPU multiplies in bf16
    published    the course's `sample_w`: a doubled batch in every step, the network as its code computes it
    diffusers    `DDPMScheduler.step` in the loop of its guided pipelines, on the same doubled batch

Six images, w = 1, T = 400, DDPM, the same noise. First all sides walk all 400 steps with two of the images, which are
compared. Then each turn is a short walk from t = 1 to 0, of another number of steps, there and back over the sides, in
one process on one thread; its images are compared too. Seconds are CPU seconds, since machines are shared. A step costs
the same in a walk of 400, so the time of 400 is that of a step as often. On a GPU, if there is one, seconds are the
clock's, walks are longer, and the images of the turns are not compared: there the peers convolve in TF32, torch's
default, but for the whole walk.

    python -m benchmarks.guided_sampling [network] [--turns 6] [--device cpu]     network: demo (default), flowers
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.apart import timed
from benchmarks.peers import PlainUNet, T, make_network
from benchmarks.train_step import has_bf16
from benchmarks.where import device_option, print_where
from diffusion.denoiser import Denoiser
from diffusion.guidance import ClassifierFree
from diffusion.networks.unet import UNet
from diffusion.rng import ImageRNG
from diffusion.samplers import DDPM
from diffusion.schedules import Linear

N, W = 6, 1.0
WHOLE = 2  # images of the whole walk
Walk = Callable[[int, int], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guided_sampling")
    parser.add_argument("network", nargs="?", default="demo")
    parser.add_argument("--turns", type=int, default=6)
    device_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = options.device
    print_where("diffusers", device=device)
    from diffusers import DDPMScheduler

    schedule = Linear(T)
    network, plain = (make_network(options.network, kind).eval().to(device) for kind in (UNet, PlainUNet))
    size = network.img_size
    cond = torch.randn(N, network.c_embed_dim, generator=torch.Generator().manual_seed(0)).to(device)
    null = torch.zeros(network.c_embed_dim, device=device)
    guided = ClassifierFree(Denoiser(network, schedule), null, W)

    def ours(steps: int, n: int) -> Tensor:
        rng = ImageRNG(range(n))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as the commands set it
            return DDPM(steps)(guided, rng.randn((3, size, size), device), rng, cond[:n])

    def ours_bf16(steps: int, n: int) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return ours(steps, n)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        both = torch.cat([cond[: len(x)], null.expand(len(x), -1)])
        with_cond, without = plain(x.repeat(2, 1, 1, 1), t.expand(2 * len(x)), both).chunk(2)
        return (1 + W) * with_cond - W * without

    def published(steps: int, n: int) -> Tensor:
        """`sample_w` on the times of a shorter walk; its noise is that of the posterior, as ours."""
        rng = ImageRNG(range(n))
        x = rng.randn((3, size, size), device)
        abar = torch.cat([torch.ones(1), torch.cumprod(1 - torch.linspace(1e-4, 0.02, T), 0)])
        walk = (DDPM(steps).times(schedule) * T).round()
        for k, s in zip(walk[:-1].long().tolist(), walk[1:].long().tolist(), strict=True):
            a = abar[k] / abar[s]
            x = (x - (1 - a) / (1 - abar[k]).sqrt() * eps(x, torch.tensor(k / T, device=device))) / a.sqrt()
            if s > 0:
                x = x + ((1 - a) * (1 - abar[s]) / (1 - abar[k])).sqrt() * rng.randn(x.shape[1:], device)
        return x

    def diffusers(steps: int, n: int) -> Tensor:
        scheduler = DDPMScheduler(T, clip_sample=False, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        rng = ImageRNG(range(n))
        generators = rng._generators
        x = rng.randn((3, size, size), device)
        for index in scheduler.timesteps:
            x = scheduler.step(eps(x, (index.to(device) + 1) / T), index, x, generator=generators).prev_sample
        return x

    walks: dict[str, Walk] = {"ours": ours} | ({"ours, bf16": ours_bf16} if device != "cpu" or has_bf16() else {})
    walks |= {"published": published, "diffusers": diffusers}
    seconds: dict[str, list[float]] = {side: [] for side in walks}
    with torch.no_grad():
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            whole = differences({side: walk(T, WHOLE) for side, walk in walks.items()})
        assert max(whole["ours"], whole["published"]) < 1e-4, whole
        for turn in range(options.turns + 1):
            # Short walks, each of another length: the time of a step does not depend on it.
            steps = (2 + turn) * (1 if device == "cpu" else 10)
            images = {}
            for side, walk in list(walks.items())[:: -1 if turn % 2 else 1]:
                took, images[side] = timed(walk, steps, N, device=device)
                if turn:  # the first one warms up
                    seconds[side].append(took / steps)
            off = differences(images)
            assert device != "cpu" or max(off["ours"], off["published"]) < 1e-4, off
    parameters = sum(p.numel() for p in network.parameters())
    print(f"network {options.network} ({parameters:,} parameters), {N} images, w = {W:g}, DDPM, one thread")
    per = "CPU second" if device == "cpu" else "second"
    print(f"{'':12}{f'{per}s per step':>22}{'400 steps':>12}{'ours is faster by':>32}{'images differ by':>20}")
    for side, values in seconds.items():
        ratios = [b / a for a, b in zip(seconds["ours"], values, strict=True)]
        step, turns = statistics.median(values), f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{side:12}{step:22.3f}{T * step:10.0f} s{statistics.median(ratios):16.3f} {turns:15}{whole[side]:20.1e}")
    print("400 steps: 400 times a step; images after a whole walk: the largest difference from diffusers', over the")
    print("largest value of theirs")


def differences(images: dict[str, Tensor]) -> dict[str, float]:
    """Of each side from diffusers: the largest, over the largest value of diffusers' images."""
    theirs = images["diffusers"]
    return {side: ((image - theirs).abs().max() / theirs.abs().max()).item() for side, image in images.items()}


if __name__ == "__main__":
    main()
