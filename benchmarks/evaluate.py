"""Scoring a folder of images: this project against torch-fidelity, and against one image at a time.

Three comparisons, each of the same files in one process, in turns of half of the images:

    metrics    from files to all metrics of ours (CLIP score, FID, KID, precision, recall, nearest image, realism,
               diversity, and the Inception Score where the weights have the last layer) against
               `torch_fidelity.calculate_metrics` with FID, KID, precision, recall (and the Inception Score). The
               reals' features are ready on both sides.
    networks   CLIP and Inception by batches against the loop of the seeds' notebooks: one image per call. Their
               guide also loads CLIP anew for every image; here it is loaded once on both sides, and the time that
               loading takes is a line of its own.
    distance   `calculate_fid` against the guide's formula with `scipy.linalg.sqrtm`, once.

Seconds are CPU seconds of this process and its children, since machines are shared; with one thread on all sides, since
threads that wait for each other on a busy machine use seconds too. The values are compared first. Peak memory is that
of a process that scores half of the images, and of one that scores all.

    python -m benchmarks.evaluate [--images 64] [--clip MODEL PRETRAINED]
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from threadpoolctl import threadpool_limits

from datamodules.drawn import DrawnFlowers
from diffusion.assessment import calculate_clip_score, calculate_fid
from diffusion.assets import AssetError
from diffusion.conditioning.openclip import load_clip
from diffusion.evaluation.clip_score import ClipScore
from diffusion.evaluation.distribution import distribution_metrics, subset_size
from diffusion.evaluation.inception import Extractor, load_extractor
from diffusion.evaluation.nearest import nearest, realism
from diffusion.evaluation.reference import Reference, reference
from diffusion.images import from_uint8, save_png
from diffusion.rng import generator

REALS, TURNS = 32, 2


@dataclass
class Task:
    """What both sides score: the files, their prompts, and the reals."""

    files: list[Path]
    prompts: list[str]
    reals: torch.Tensor
    names: tuple[str, ...]
    digest: str

    def part(self, rows: slice) -> "Task":
        return Task(self.files[rows], self.prompts[rows], self.reals, self.names, self.digest)


def make_task(n: int, folder: Path) -> Task:
    """Drawn flowers with noise as files, in the place of generated ones, and others without it as reals."""
    data = DrawnFlowers(seed=0, batch_size=REALS, n_train=n, n_val=REALS)
    data.prepare_data()
    data.setup("fit")
    files = [folder / f"{k // -(-n // TURNS)}" / f"{k:06d}.png" for k in range(n)]
    for k, (path, image) in enumerate(zip(files, data.pixels("train"), strict=True)):
        save_png(from_uint8(image) + 0.3 * torch.randn(image.shape, generator=generator(k)), path)
    prompts = [data.table.captions[row] for row in data.splits["train"]]
    names = tuple(data.table.names[row] for row in data.splits["val"])
    return Task(files, prompts, data.pixels("val"), names, data.table.digest)


class Ours:
    """Files to scores, by batches."""

    def __init__(self, task: Task, clip: tuple[str, str]) -> None:
        self.extractor: Extractor = load_extractor()
        self.reference: Reference = reference(task.reals, task.names, task.digest, "val", self.extractor)
        self.scorer = ClipScore(*clip)
        self.scorer.load()

    def networks(self, task: Task) -> dict[str, Any]:
        pixels = np.stack([np.asarray(Image.open(path)) for path in task.files])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        clip = self.scorer.score(from_uint8(images), task.prompts)
        return {"images": images, "clip": clip.numpy(), "features": self.extractor.features(images)}

    def metrics(self, seen: dict[str, Any]) -> dict[str, float | None]:
        features, reals = seen["features"], self.reference.features
        nearest(features.pool, reals)
        realism(features.pool, reals)
        results = distribution_metrics(features, self.reference, seen["images"], self.extractor, {}, few_images="allow")
        return {key.rpartition("_")[0]: result.value for key, result in results.items()}


class OneByOne:
    """The loop of the notebooks: one image per call."""

    def __init__(self, extractor: Extractor, clip: tuple[str, str]) -> None:
        self.extractor, self.clip = extractor, clip

    def networks(self, task: Task) -> dict[str, np.ndarray]:
        scores, rows = [], []
        for path, prompt in zip(task.files, task.prompts, strict=True):
            scores.append(calculate_clip_score(path, prompt, *self.clip))
            pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)
            rows.append(self.extractor.features(pixels[None]).pool)
        return {"clip": np.array(scores), "pool": np.concatenate(rows)}


class TorchFidelity:
    """`calculate_metrics`, with the same weights, and with the reals' features in its cache."""

    def __init__(self, task: Task, extractor: Extractor, folder: Path) -> None:
        for k, image in enumerate(task.reals):
            save_png(from_uint8(image), folder / "reals" / f"{k:06d}.png")
        torch.save(extractor._network.state_dict(), folder / "inception.pth")
        self.extractor, self.folder = extractor, folder

    def warm_up(self, image: torch.Tensor) -> None:
        """Fills the cache of the reals."""
        for k in range(2):
            save_png(from_uint8(image), self.folder / "warm" / f"{k}.png")
        self._calculate(self.folder / "warm", kid=True, kid_subset_size=2)

    def _calculate(self, images: Path, **metrics: Any) -> dict[str, float]:
        from torch_fidelity import calculate_metrics

        return calculate_metrics(
            input1=str(images),
            input2=str(self.folder / "reals"),
            input2_cache_name="reals",
            cache_root=str(self.folder / "cache"),
            feature_extractor=self.extractor.name,  # by itself it takes VGG for precision and recall
            feature_extractor_weights_path=str(self.folder / "inception.pth"),
            cuda=False,
            batch_size=32,
            verbose=False,
            **metrics,
        )

    def metrics(self, task: Task) -> dict[str, float]:
        values = self._calculate(
            task.files[0].parent,
            isc=self.extractor.has_logits,
            fid=True,
            kid=True,
            prc=True,
            kid_subset_size=subset_size(len(task.files), len(task.reals)),
        )
        names = {
            "fid": "frechet_inception_distance",
            "kid": "kernel_inception_distance_mean",
            "precision": "precision",
            "recall": "recall",
            "is": "inception_score_mean",
            "is_std": "inception_score_std",
        }
        return {ours: values[theirs] for ours, theirs in names.items() if theirs in values}


def guides_fid(real: np.ndarray, generated: np.ndarray) -> float:
    """The assessment's formula, as it is written there."""
    mu_1, sigma_1 = real.mean(0), np.cov(real, rowvar=False)
    mu_2, sigma_2 = generated.mean(0), np.cov(generated, rowvar=False)
    root = scipy.linalg.sqrtm(sigma_1.dot(sigma_2)).real
    return float(((mu_1 - mu_2) ** 2).sum() + np.trace(sigma_1 + sigma_2 - 2 * root))


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """CPU seconds, those of children too, and what the call returned."""
    before = cpu_seconds()
    result = call(*arguments)
    return cpu_seconds() - before, result


def cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def peak_megabytes(n: int, clip: tuple[str, str]) -> int:
    command = [sys.executable, "-m", "benchmarks.evaluate", "--images", str(n), "--clip", *clip, "--only-ours"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def only_ours(n: int, clip: tuple[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(n, Path(folder))
        ours = Ours(task, clip)
        ours.metrics(ours.networks(task))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate")
    parser.add_argument("--images", type=int, default=64, help="how many are scored")
    parser.add_argument("--clip", nargs=2, default=("anther-flowers-32", "embedded"), metavar=("MODEL", "PRETRAINED"))
    parser.add_argument("--only-ours", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    n, clip = options.images, tuple(options.clip)
    if n < 32:
        parser.error("--images must be 32 or more")
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # torch-fidelity's
    torch.set_num_threads(1)
    threadpool_limits(1)
    try:
        load_extractor()
    except AssetError as error:
        sys.exit(f"error: nothing was measured: {error}")
    if options.only_ours:
        only_ours(n, clip)
        return

    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(n, Path(folder))
        ours = Ours(task, clip)
        theirs = TorchFidelity(task, ours.extractor, Path(folder))
        one_by_one = OneByOne(ours.extractor, clip)
        size = -(-n // TURNS)
        warm_up = task.part(slice(0, 2))
        ours.networks(warm_up)
        one_by_one.networks(warm_up)
        theirs.warm_up(task.reals[0])

        for turn in range(TURNS):
            part = task.part(slice(turn * size, (turn + 1) * size))
            few = part.part(slice(0, 16))
            took = {}
            took["torch-fidelity"], expected = timed(theirs.metrics, part)
            took["networks"], batched = timed(ours.networks, part)
            took["metrics"], values = timed(ours.metrics, batched)
            took["one by one"], single = timed(one_by_one.networks, few)
            for key, value in expected.items():
                tolerance = 1e-3 if key.startswith("is") else 1e-6
                assert np.isclose(values[key], value, rtol=tolerance, atol=0), (key, values[key], value)
            assert np.allclose(single["clip"], batched["clip"][:16], atol=1e-5)
            assert np.allclose(single["pool"], batched["features"].pool[:16], atol=1e-4)
            for side, s in took.items():
                seconds.setdefault(side, []).append(s / len(few.files if side == "one by one" else part.files))
        seconds["all"] = [a + b for a, b in zip(seconds["networks"], seconds["metrics"], strict=True)]

        real, generated = np.asarray(ours.reference.features), batched["features"].pool
        guide_seconds, guide = timed(guides_fid, real, generated)
        our_seconds, fid = timed(calculate_fid, real, generated)
        clip_seconds, _ = timed(load_clip, *clip)
        # The guide's root of a singular matrix is not exact.
        assert np.isclose(fid, guide, rtol=1e-4), (fid, guide)

    def row(name: str, side: str) -> None:
        print(f"{name:48}{1 / statistics.median(seconds[side]):8.2f} images per CPU second")

    def ratio(a: str, b: str) -> None:
        pairs = zip(seconds[a], seconds[b], strict=True)
        print(f"{'ratio':48}{statistics.median(theirs / ours for ours, theirs in pairs):8.3f}")

    scorer = f"{ours.scorer.name}, FID Inception {ours.extractor.weights_hash[:8]}"
    print(f"{n} images of 32 px in {TURNS} turns, {REALS} reals, {scorer}, one thread")
    print(f"equal on both sides: {', '.join(expected)}")
    row("CLIP, Inception and all metrics, ours", "all")
    row("Inception and these metrics, torch-fidelity", "torch-fidelity")
    ratio("all", "torch-fidelity")
    row("CLIP and Inception, ours", "networks")
    row("CLIP and Inception, one image per call", "one by one")
    ratio("networks", "one by one")
    rows = f"{len(generated)} and {len(real)} rows"
    print(f"{'loading CLIP, in the guide once per image':48}{clip_seconds:8.2f} CPU seconds")
    print(f"{f'Fréchet distance of {rows}, calculate_fid':48}{our_seconds:8.4f} CPU seconds")
    print(f"{f'Fréchet distance of {rows}, sqrtm':48}{guide_seconds:8.4f} CPU seconds")
    print(f"{'ratio':48}{guide_seconds / our_seconds:8.0f}")
    for count in (size, n):
        print(f"{f'peak memory, {count} images':48}{peak_megabytes(count, clip):8d} MB")


if __name__ == "__main__":
    main()
