"""Time to the KID of 400-step sampling: every solver against all 400 steps of DDIM and of DDPM, on the demo's network.

The same seeds and captions for every row, drawn in turns of one batch; the captions and the real images are those of
the drawn flowers' validation split. Per row:

    calls     of the network, each guided (both branches)
    CPU s     of drawing one image, one thread; seconds of this process, since machines are shared
    ratio     seconds of the 400 steps of DDIM over the row's. A call costs the same in every row: by calls the ratio is
              400 over the row's, and what differs from that is noise
    KID       as evaluate.py computes it, with its deviation over subsets
    distance  from the image of the same seed by 400 steps of DDIM: root mean square over pixels in [-1, 1]. Solvers of
              the flow draw the same image, those with noise another one

and against the 400 steps of either sampler, where they are among the rows:

    diff.     of the row's KID from theirs
    finds     the smallest difference that these images can tell from none: two of its standard errors, for these reals
    reached   yes: the difference is at most that; within: it is more, and less than the deviation of the 400 steps'
              KID; else no

`yes` says that no loss was found, not that there is none: with fewer images `finds` grows, and `yes` comes easier. The
error is the first-order one of a difference of U-statistics (as of Bounliphone et al., 2016, arXiv 1511.04581, whose
models draw apart) over pairs of images: the covariance of what a pair shares is in it, whatever that is. Solvers of the
flow share nearly all of an image, and are known better than either KID; where one of the two draws noise on its way,
they share the caption and the noise at t = 1, and `finds` is as large as that leaves it.

    python -m benchmarks.solvers [--ckpt runs/demo/checkpoints/last.ckpt] [--images 16] [--rows few|all]
                                 [--picture FILE]
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.where import print_where
from datamodules.drawn import DrawnFlowers
from diffusion.assets import AssetError
from diffusion.checkpoint import load_model
from diffusion.errors import AntherError
from diffusion.evaluation.distribution import kid
from diffusion.evaluation.inception import Extractor, load_extractor
from diffusion.evaluation.reference import reference
from diffusion.images import grid, to_pil, to_uint8
from diffusion.modules.diffusion import Diffusion
from diffusion.samplers import DDIM, DDPM, DPMpp, Heun, Sampler

REALS, BATCH, SHOWN = 256, 16, 8
REFERENCES = ("DDIM, 400", "DDPM, 400")


FEW = (REFERENCES[0], "DDIM = Euler, 20", "DPM-Solver++ 2M, 10", "DPM-Solver++ 2M, 20")


def samplers(rows: str, T: int) -> dict[str, Sampler]:
    """The rows of the table; all clip as the demo does, and lie on the trailing grid where none is named."""
    every: dict[str, Sampler] = {
        REFERENCES[0]: DDIM(T, clip=True),
        REFERENCES[1]: DDPM(T, clip=True),
        "DDIM = Euler, 10": DDIM(10, clip=True),
        "DDIM = Euler, 15": DDIM(15, clip=True),
        "DDIM = Euler, 20": DDIM(20, clip=True),
        "DDIM = Euler, 50": DDIM(50, clip=True),
        "DDIM = Euler, log-SNR, 20": DDIM(20, clip=True, grid="logsnr"),
        "DDIM = Euler, Karras, 20": DDIM(20, clip=True, grid="karras"),
        "Heun, 10": Heun(10, clip=True, grid="trailing"),
        "Heun, log-SNR, 10": Heun(10, clip=True, grid="logsnr"),
        "Heun, Karras, 10": Heun(10, clip=True),
        "Heun, Karras, 18 (as shipped)": Heun(clip=True),
        "DPM-Solver++ 2M, 10": DPMpp(10, clip=True),
        "DPM-Solver++ 2M, 15": DPMpp(15, clip=True),
        "DPM-Solver++ 2M, 20": DPMpp(20, clip=True),
        "DPM-Solver++ 2M, log-SNR, 20": DPMpp(20, clip=True, grid="logsnr"),
        "DPM-Solver++ 2M, Karras, 20": DPMpp(20, clip=True, grid="karras"),
        "DPM-Solver++ SDE-2M, 15": DPMpp(15, sde=True, clip=True),
        "DPM-Solver++ SDE-2M, 20": DPMpp(20, sde=True, clip=True),
        "DPM-Solver++ SDE-2M, 50": DPMpp(50, sde=True, clip=True),
        "DDPM, 20": DDPM(20, clip=True),
        "DDPM, 50": DDPM(50, clip=True),
    }
    return every if rows == "all" else {name: every[name] for name in FEW}


@dataclass
class Drawn:
    """What one row has drawn so far."""

    sampler: Sampler
    images: list[Tensor] = field(default_factory=list)
    pool: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0
    calls: int = 0


def flowers() -> DrawnFlowers:
    data = DrawnFlowers(seed=0, batch_size=REALS, n_train=1, n_val=REALS)
    data.prepare_data()
    data.setup("fit")
    return data


def draw(model: Diffusion, extractor: Extractor, captions: list[str], rows: str, n: int) -> Iterator[dict[str, Drawn]]:
    """Draws n images a row, a batch of each row in turn; yields what there is after every batch."""
    table = {name: Drawn(sampler) for name, sampler in samplers(rows, model.denoiser.schedule.T).items()}
    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1

    # Once per guided call: what the branches share is computed there.
    model.denoiser.network.down0.register_forward_hook(count)  # type: ignore[union-attr]
    for start in range(0, n, BATCH):
        seeds = list(range(start, min(start + BATCH, n)))
        prompts = [captions[seed % len(captions)] for seed in seeds]
        for row in table.values():
            made, before = 0, time.process_time()
            images = model.sample(prompts, seeds, sampler=row.sampler)
            row.seconds += time.process_time() - before
            row.calls = made
            row.images.append(images)
            row.pool.append(extractor.features(to_uint8(images)).pool)
        yield table


def influence(generated: np.ndarray, real: np.ndarray) -> np.ndarray:
    """How much each generated image moves the squared MMD, (N,): twice its mean kernel to the others less the reals."""
    g, r = generated.astype(np.float64), real.astype(np.float64)
    to_generated, to_real = (g @ g.T / g.shape[1] + 1) ** 3, (g @ r.T / g.shape[1] + 1) ** 3
    others: np.ndarray = (to_generated.sum(1) - np.diag(to_generated)) / (len(g) - 1)
    return 2 * (others - to_real.mean(1))


def print_table(table: Mapping[str, Drawn], real: np.ndarray) -> None:
    slow, pools = table[REFERENCES[0]], {name: np.concatenate(row.pool) for name, row in table.items()}
    n, kids = len(pools[REFERENCES[0]]), {name: kid(pool, real) for name, pool in pools.items()}
    goals = [name for name in REFERENCES if name in table]
    print(f"{n} images a row against {len(real)} reals, guided, one thread")
    print(f"{'':80}" + "".join(f"{f'against {goal}':27}" for goal in goals).rstrip())
    columns = len(goals) * f"{'diff.':>9}{'finds':>8}  reached "
    print(f"{'':30}{'calls':>6}{'CPU s':>8}{'ratio':>7}{'KID':>9}{'dev.':>8}{'distance':>10}{columns.rstrip()}")
    found: dict[str, list[float]] = {goal: [] for goal in goals}
    for name, row in table.items():
        value, deviation = kids[name]
        distance = (torch.cat(row.images) - torch.cat(slow.images)).clamp(-2, 2).square().mean().sqrt().item()
        line = f"{name:30}{row.calls:6}{row.seconds / n:8.3f}{slow.seconds / row.seconds:7.1f}{value:9.4f}"
        line += f"{deviation:8.4f}{distance:10.3f}"
        for goal in goals:
            if name == goal:
                line += f"{'-':>9}{'-':>8}  {'-':8}"
                continue
            moved = influence(pools[name], real) - influence(pools[goal], real)
            finds = 2 * float(moved.std(ddof=1)) / n**0.5
            difference = value - kids[goal][0]
            reached = "yes" if difference <= finds else "within" if difference < kids[goal][1] else "no"
            found[goal].append(finds)
            line += f"{difference:9.4f}{finds:8.4f}  {reached:8}"
        print(line.rstrip())
    for goal, values in found.items():
        low, high = min(values), max(values)
        print(
            f"{n} images cannot tell a KID from that of {goal} where they lie nearer than {low:.4f} to {high:.4f}, by "
            f"rows: {low / kids[goal][0]:.0%} to {high / kids[goal][0]:.0%} of it"
        )


def save_picture(table: Mapping[str, Drawn], path: Path) -> None:
    """A row of images per row of the table, a column per seed."""
    shown = [torch.cat(row.images)[:SHOWN].clamp(-1, 1) for row in table.values()]
    margin, pictures = 190, [to_pil(grid(images, SHOWN, scale=2)) for images in shown]
    width, height = pictures[0].size
    canvas = Image.new("RGB", (margin + width, height * len(pictures)), "white")
    for k, (name, picture) in enumerate(zip(table, pictures, strict=True)):
        canvas.paste(picture, (margin, k * height))
        ImageDraw.Draw(canvas).text((4, k * height + height // 2), name, "black", anchor="lm")
    canvas.quantize(256).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solvers")
    parser.add_argument("--ckpt", default="runs/demo/checkpoints/last.ckpt", help="of experiment=demo")
    parser.add_argument("--images", type=int, default=BATCH, help="per row")
    parser.add_argument("--rows", choices=("few", "all"), default="few")
    parser.add_argument("--picture", type=Path, help="where the first seeds of all rows are saved side by side")
    options = parser.parse_args()
    if options.images < 2:
        parser.error("--images must be 2 or more")
    torch.set_num_threads(1)
    threadpool_limits(1)
    try:
        model, extractor = load_model(options.ckpt), load_extractor()
    except (AssetError, AntherError) as error:
        sys.exit(f"error: nothing was measured: {error}")
    print_where()
    data = flowers()
    captions = [data.table.captions[row] for row in data.splits["val"]]
    names = [data.table.names[row] for row in data.splits["val"]]
    real = np.asarray(reference(data.pixels("val"), names, data.table.digest, "val", extractor).features)
    model.sample(captions[:2], [0, 1])  # what is computed once is computed now
    for table in draw(model, extractor, captions, options.rows, options.images):
        done = sum(map(len, table[REFERENCES[0]].images))
        print(f"{done} of {options.images} images a row", file=sys.stderr)
    print_table(table, real)
    if options.picture:
        save_picture(table, options.picture)


if __name__ == "__main__":
    main()
