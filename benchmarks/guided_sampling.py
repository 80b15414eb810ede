"""Guided sampling against the published way and against diffusers' scheduler loop: the same images, and how fast.

    ours         as `Diffusion.sample` does it: the encoder and the half of a convolution over a skip once for both
                 branches, doubled maps never made
    ours, bf16   the same under autocast, where this CPU multiplies in bf16
    published    the course's `sample_w`: a doubled batch in every step, the network as its code computes it
    diffusers    `DDPMScheduler.step` in the loop of its guided pipelines, on the same doubled batch

Six images, w = 1, T = 400, DDPM, the same noise. Each turn is a short walk from t = 1 to 0, of another number of steps,
on all sides, in one process on one thread; seconds are CPU seconds, since machines are shared. A step costs the same
in a walk of 400. The images of every walk are compared.

    python -m benchmarks.guided_sampling [network] [--turns 6]     network: demo (default), flowers
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import PlainUNet, T, make_network
from benchmarks.train_step import has_bf16
from diffusion.denoiser import Denoiser
from diffusion.guidance import ClassifierFree
from diffusion.rng import ImageRNG
from diffusion.samplers import DDPM
from diffusion.schedules import Linear

N, W = 6, 1.0
Walk = Callable[[int], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guided_sampling")
    parser.add_argument("network", nargs="?", default="demo")
    parser.add_argument("--turns", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    from diffusers import DDPMScheduler

    schedule = Linear(T)
    network, plain = make_network(options.network).eval(), make_network(options.network, PlainUNet).eval()
    size = network.img_size
    cond = torch.randn(N, network.c_embed_dim, generator=torch.Generator().manual_seed(0))
    null = torch.zeros(network.c_embed_dim)
    both = torch.cat([cond, null.expand_as(cond)])
    guided = ClassifierFree(Denoiser(network, schedule), null, W)

    def ours(steps: int) -> Tensor:
        rng = ImageRNG(range(N))
        return DDPM(steps)(guided, rng.randn((3, size, size)), rng, cond)

    def ours_bf16(steps: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ours(steps)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        with_cond, without = plain(x.repeat(2, 1, 1, 1), t.expand(2 * N), both).chunk(2)
        return (1 + W) * with_cond - W * without

    def published(steps: int) -> Tensor:
        """`sample_w` on the times of a shorter walk; its noise is that of the posterior, as ours."""
        rng = ImageRNG(range(N))
        x = rng.randn((3, size, size))
        abar = torch.cat([torch.ones(1), torch.cumprod(1 - torch.linspace(1e-4, 0.02, T), 0)])
        walk = DDPM(steps).times(schedule) * T
        for k, s in zip(walk[:-1].long().tolist(), walk[1:].long().tolist(), strict=True):
            a = abar[k] / abar[s]
            x = (x - (1 - a) / (1 - abar[k]).sqrt() * eps(x, torch.tensor(k / T))) / a.sqrt()
            if s > 0:
                x = x + ((1 - a) * (1 - abar[s]) / (1 - abar[k])).sqrt() * rng.randn(x.shape[1:])
        return x

    def diffusers(steps: int) -> Tensor:
        scheduler = DDPMScheduler(T, clip_sample=False, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        rng = ImageRNG(range(N))
        generators = rng._generators
        x = rng.randn((3, size, size))
        for index in scheduler.timesteps:
            x = scheduler.step(eps(x, (index + 1) / T), index, x, generator=generators).prev_sample
        return x

    walks: dict[str, Walk] = {"ours": ours} | ({"ours, bf16": ours_bf16} if has_bf16() else {})
    walks |= {"published": published, "diffusers": diffusers}
    seconds: dict[str, list[float]] = {side: [] for side in walks}
    furthest = dict.fromkeys(walks, 0.0)
    with torch.no_grad():
        for turn in range(options.turns + 1):
            steps = 2 + turn  # short walks, each of another length: the time of a step does not depend on it
            images = {}
            for side, walk in walks.items():
                before = time.process_time()
                images[side] = walk(steps)
                if turn:  # the first one warms up
                    seconds[side].append((time.process_time() - before) / steps)
            for side, image in images.items():
                off = (image - images["diffusers"]).abs().max() / images["diffusers"].abs().max()
                furthest[side] = max(furthest[side], off.item())
    assert furthest["ours"] < 1e-4, furthest
    parameters = sum(p.numel() for p in network.parameters())
    print(f"network {options.network} ({parameters:,} parameters), {N} images, w = {W:g}, DDPM, one thread")
    print(f"{'':12}{'CPU seconds per step':>22}{'400 steps':>12}{'ours is faster by':>20}{'images differ by':>20}")
    for side, values in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], values, strict=True))
        step = statistics.median(values)
        print(f"{side:12}{step:22.3f}{400 * step:10.0f} s{ratio:20.3f}{furthest[side]:20.1e}")
    print(
        "difference from diffusers: the largest, over the largest value of the images; the published table is float32"
    )


if __name__ == "__main__":
    main()
