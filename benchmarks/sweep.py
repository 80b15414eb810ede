"""The second point of a sweep of guidance weights against the first: what evaluate.py need not do again.

A small model of the demo is trained for two steps and evaluated by `evaluate.py -m guidance.weight=1,2,4`, from an
empty cache of reference statistics to the report of each point. The first point pays for imports, model, CLIP,
Inception and the statistics of the real images; the others draw, score and report. The last point is made once more, by
a run of its own from the same cache, and its metrics are compared. Seconds are CPU seconds of a process and its
children, with one thread, since machines are shared.

    python -m benchmarks.sweep [--images 64] [--reals 256] [--dataset]
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from benchmarks.apart import cpu_seconds, timed
from benchmarks.where import print_where
from diffusion.allocator import keep_freed_memory
from diffusion.assets import cache_dir
from diffusion.evaluation.report import read_metrics

ROOT = Path(__file__).resolve().parents[1]


class Clock(Callback):
    """Notes the CPU seconds of each job of a sweep."""

    def __init__(self) -> None:
        self._before = 0.0

    def on_job_start(self, config: Any, **kwargs: Any) -> None:
        self._before = cpu_seconds()

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        job_return.return_value  # noqa: B018 - raises what the job raised
        SECONDS.append(cpu_seconds() - self._before)


SECONDS: list[float] = []
WEIGHTS = (1, 2, 4)  # each of both branches, as much work


def train(folder: Path, reals: int) -> Path:
    """The checkpoint of a small model after two steps."""
    tiny = [f"data.n_train={reals}", "data.n_val=16", "data.batch_size=8", "callbacks=fit", "trainer.max_steps=2"]
    words = [sys.executable, "train.py", "experiment=demo", *tiny, f"hydra.run.dir={folder}"]
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / "checkpoints" / "last.ckpt"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep")
    parser.add_argument("--images", type=int, default=64, help="at each point")
    parser.add_argument("--reals", type=int, default=256, help="whose statistics the first point computes")
    parser.add_argument("--dataset", action="store_true", help="also build and export the FiftyOne data sets")
    options = parser.parse_args()
    keep_freed_memory()  # as the command does
    print_where()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Weights are found where they were; statistics are not.
        assets = cache_dir() / "assets"
        (folder / "cache").mkdir()
        (folder / "cache" / "assets").symlink_to(assets, target_is_directory=True)
        os.environ["ANTHER_CACHE"] = str(folder / "cache")
        checkpoint = train(folder / "trained", options.reals)
        sweep(checkpoint, folder / "sweep", options)
        last = folder / "sweep" / str(len(WEIGHTS) - 1)
        alone = run_alone(checkpoint, folder / "alone", options)
        compare(last, folder / "alone")
    first, *others = SECONDS
    rest = sum(others) / len(others)
    what = "with" if options.dataset else "without"
    print(f"{options.images} images a point, {options.reals} real ones, {what} the FiftyOne data set, one thread")
    print(f"{'first point':48}{first:8.2f} CPU seconds")
    print(f"{'the points after it, mean':48}{rest:8.2f} CPU seconds")
    print(f"{'ratio':48}{rest / first:8.3f}")
    print(f"{'the last of them as a run of its own':48}{alone:8.2f} CPU seconds, equal metrics")


def settings(checkpoint: Path, options: argparse.Namespace) -> list[str]:
    """What every point is evaluated with."""
    return [
        f"ckpt={checkpoint}",
        "prompts=demo",
        f"num_images={options.images}",
        "sampler=ddim",
        "sampler.steps=10",
        "clip.model=anther-flowers-32",
        "clip.pretrained=embedded",
        "inception.split=train",
        *([] if options.dataset else ["dataset=null"]),
    ]


def sweep(checkpoint: Path, folder: Path, options: argparse.Namespace) -> None:
    import evaluate

    sys.argv = [
        str(ROOT / "evaluate.py"),
        "-m",
        *settings(checkpoint, options),
        f"guidance.weight={','.join(map(str, WEIGHTS))}",
        f"hydra.sweep.dir={folder}",
        "+hydra.callbacks.clock._target_=benchmarks.sweep.Clock",
    ]
    evaluate.main()


def run_alone(checkpoint: Path, folder: Path, options: argparse.Namespace) -> float:
    """CPU seconds of the last point by a process of its own."""
    words = [f"guidance.weight={WEIGHTS[-1]}", f"hydra.run.dir={folder}"]
    command = [sys.executable, "evaluate.py", *settings(checkpoint, options), *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return timed(lambda: subprocess.run(command, cwd=ROOT, check=True, **quiet))[0]


def compare(one: Path, other: Path) -> None:
    """Sees that two evaluations of the same thing have the same metrics."""
    (_, here), (_, there) = read_metrics(one), read_metrics(other)
    assert here.keys() == there.keys(), here.keys() ^ there.keys()
    for key, result in here.items():
        value, expected = result.value, there[key].value
        same = value == expected if None in (value, expected) else math.isclose(value, expected, rel_tol=1e-4)
        assert same, (key, value, expected)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    # One clock: the callback is found under the module's name, not under __main__.
    from benchmarks import sweep as module

    module.main()
