"""Peak memory of an evaluation against the number of images: it must not grow.

`evaluate` itself, in a fresh process for each number: images of 32 px to files, records, all scores against 500 real
images, plots, report and image folder; without the FiftyOne data set, whose database holds every sample. Tens of
thousands of passes of Inception and CLIP would take hours and say nothing about memory that grows, so that three
things are STAND-INS: the images are noise that no model drew, Inception is a random projection to 512 numbers and 1008
logits, and CLIP's image tower averages pixels.

    python -m benchmarks.memory [--images 500 5000]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.where import print_where

ROOT = Path(__file__).resolve().parents[1]
EMBEDDING = 512
SHAPE = (3, 32, 32)


def stand_in() -> Any:
    """An extractor like Inception's, as fast as a matrix product."""
    import numpy as np
    import torch

    from diffusion.evaluation.inception import Extractor, Features
    from diffusion.rng import generator

    class StandIn(Extractor):
        name, dim, has_logits = "random projection", 512, True

        def __init__(self) -> None:
            self._first = torch.randn(int(np.prod(SHAPE)), self.dim, generator=generator(0)) / 50
            self._second = torch.randn(self.dim, 1008, generator=generator(1)) / 20
            self.one_channel, self.weights_hash = "refuse", "none"
            self.protocol = {"extractor": self.name}

        def part_features(self, images: torch.Tensor, batch_size: int = 32, label: str | None = None) -> Features:
            pool = (images.flatten(1).float() / 255 @ self._first).relu()
            return Features(pool.numpy(), (pool @ self._second).numpy())

    return StandIn()


def evaluate(n: int, folder: Path) -> None:
    """The evaluation of n images, with what stands in for the networks."""
    import torch
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from diffusion.build import build
    from diffusion.conditioning.openclip import ClipModel
    from diffusion.evaluation import generate, run, scoring
    from diffusion.evaluation.subject import Subject
    from diffusion.rng import generator

    overrides = ["ckpt=none", "prompts=demo", f"num_images={n}", "clip.model=anther-flowers-32"]
    overrides += ["clip.pretrained=embedded", "inception.split=train", "dataset=null", "batch_size=256"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        trained = compose("train", ["experiment=demo", "data.n_train=500", "data.n_val=50"])
        module = {"module": trained.module, "data": trained.data}
        config: Any = OmegaConf.to_container(compose("evaluate", overrides))
    described: Any = {key: OmegaConf.to_container(node, resolve=True) for key, node in module.items()}
    subject = Subject(build(described["module"]).eval(), described, "none", "0" * 64, None)

    def draw(model: Any, plan: Any, chunk: range) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(len(chunk), *SHAPE, generator=generator(chunk[0], 0))
        return noise.mul(0.5).clamp(-1, 1), torch.randn(len(chunk), EMBEDDING, generator=generator(chunk[0], 1))

    def encode(self: ClipModel, images: Any) -> torch.Tensor:
        means = [image.resize((1, 1)).getpixel((0, 0))[0] for image in images]
        return torch.tensor(means)[:, None].float().add(1).expand(-1, self.dim)

    with (
        patch.object(run, "load_subject", lambda *_: subject),
        patch.object(generate, "_draw", draw),
        patch.object(scoring, "load_extractor", lambda *_: stand_in()),
        patch.object(ClipModel, "encode_images", encode),
    ):
        run.evaluate({**config, "overrides": overrides, "sweep_dir": None}, folder)


def peak_megabytes(n: int) -> tuple[int, float]:
    """Of a process that evaluates n images, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "benchmarks.memory", "--only", str(n)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return int(done.stdout.splitlines()[-1]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--images", type=int, nargs="+", default=[500, 5000], help="one process each")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        import torch

        from diffusion.allocator import keep_freed_memory

        torch.set_num_threads(1)
        keep_freed_memory()  # as the command does
        with tempfile.TemporaryDirectory() as folder:
            evaluate(options.only, Path(folder))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    print_where()
    print("images drawn by nobody, a projection in the place of Inception, pixels in the place of CLIP: memory only")
    print(f"{'images':>10}{'peak MB':>10}{'ratio':>10}{'CPU s':>10}")
    first = 0
    for n in options.images:
        peak, seconds = peak_megabytes(n)
        first = first or peak
        print(f"{n:10d}{peak:10d}{peak / first:10.3f}{seconds:10.0f}", flush=True)


if __name__ == "__main__":
    main()
