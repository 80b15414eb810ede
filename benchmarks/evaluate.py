"""Scoring a folder of images: this project against torch-fidelity, and against the course's way, an image at a time.

Comparisons of the same files, in turns of half of the images; the reals' features are ready:

    ours             what evaluate.py does, from files to CLIP score, FID, KID, precision, recall, diversity, nearest
                     image, realism, and the Inception Score and entropy where the weights have the last layer; with
                     and without glibc's allocator set to keep freed memory, as our commands set it
    torch-fidelity   `calculate_metrics` with FID, KID, precision, recall (and the Inception Score); no CLIP
    one by one       CLIP score and Inception features of one image per call, then the guide's formula of FID with
                     `scipy.linalg.sqrtm`; as the guide is written, `calculate_clip_score` also loads CLIP for each
                     image. Timed on 8 images and one loading; the cost of all is that times their number.

The values are compared first. Peak memory is that of the process with the allocator untouched, after the first 8 images
and after all. Seconds are CPU seconds, of children too, since machines are shared; with one thread on
all sides, since threads that wait for each other on a busy machine use seconds too. The last two have a process of
their own, since what ours sets for a whole process would help them too; ours with the allocator untouched has another.

Without `--clip` the CLIP has the guide's architecture, ViT-B-32, and random weights: what it costs is the same.

    python -m benchmarks.evaluate [--images 64] [--clip MODEL PRETRAINED]
"""

import argparse
import logging
import resource
import statistics
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from threadpoolctl import threadpool_limits

from benchmarks.apart import Apart, timed
from datamodules.drawn import DrawnFlowers
from diffusion.allocator import keep_freed_memory
from diffusion.assessment import calculate_clip_score, calculate_fid
from diffusion.assets import AssetError
from diffusion.conditioning.openclip import load_clip
from diffusion.evaluation.distribution import subset_size
from diffusion.evaluation.inception import Extractor, _default_weights, load_extractor, load_network
from diffusion.evaluation.report import split_key
from diffusion.evaluation.scoring import Scorers, load_clip_scorer
from diffusion.images import PngFiles, from_uint8, read_pngs, save_png
from diffusion.rng import generator

REALS, TURNS, FEW = 32, 2, 8


@dataclass
class Task:
    """What both sides score: the files and their prompts, of `n` images in all."""

    files: list[Path]
    prompts: list[str]
    n: int

    def part(self, rows: slice) -> "Task":
        return Task(self.files[rows], self.prompts[rows], self.n)


def make_data(n: int) -> DrawnFlowers:
    """Its training images, with noise, are in the place of generated ones; the others are the reals."""
    data = DrawnFlowers(seed=0, batch_size=REALS, n_train=n, n_val=REALS)
    data.prepare_data()
    data.setup("fit")
    return data


def make_task(n: int, folder: Path) -> Task:
    """Writes the files."""
    data = make_data(n)
    files = [folder / f"{k // -(-n // TURNS)}" / f"{k:06d}.png" for k in range(n)]
    for k, (path, image) in enumerate(zip(files, data.pixels("train"), strict=True)):
        save_png(from_uint8(image) + 0.3 * torch.randn(image.shape, generator=generator(k)), path)
    return Task(files, [data.table.captions[row] for row in data.splits["train"]], n)


class Ours:
    """What evaluate.py does with the files of a run and a model with a condition, the reals' features being ready."""

    def __init__(self, task: Task, clip: tuple[str, str]) -> None:
        data = make_data(task.n)
        chosen = {"split": "val", "weights": None, "few_images": "allow", "one_channel": "refuse", "missing": "refuse"}
        config = {
            "clip": dict(zip(("model", "pretrained"), clip, strict=True)),
            "classifier": None,
            "num_images": len(task.files) // TURNS,
            "inception": chosen,
            "nearest": {"space": "inception", "split": "val"},
        }
        model = SimpleNamespace(conditioner=object())
        conditioned: Any = SimpleNamespace(model=model, other_splits=lambda datamodule: [])
        self.scorers = Scorers(config, conditioned, data, "cpu")
        self.extractor, self.clip = load_extractor(), load_clip_scorer(*clip, "cpu")

    def scores(self, task: Task) -> tuple[dict[str, float | None], list[float]]:
        """Every metric by its name without N, and the CLIP score of each image."""
        images, labels = PngFiles(task.files), [None] * len(task.files)
        scores = self.scorers.score(images, task.prompts, labels, {}, task.files[0].parent)
        values = {split_key(key).name: result.value for key, result in scores.results.items()}
        return values, scores.columns["clip_score"]

    def peak(self) -> float:
        """MB that this process has had at most."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class OneByOne:
    """The loop of the notebooks: one image per call, by the network as it is published."""

    def __init__(self, clip: tuple[str, str]) -> None:
        self.network, self.clip = load_network(_default_weights())[0], clip

    def networks(self, task: Task) -> dict[str, np.ndarray]:
        scores, rows = [], []
        for path, prompt in zip(task.files, task.prompts, strict=True):
            scores.append(calculate_clip_score(path, prompt, *self.clip))
            pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)
            with torch.inference_mode():
                rows.append(self.network(pixels[None])[0].numpy())
        return {"clip": np.array(scores), "pool": np.concatenate(rows)}


class TorchFidelity:
    """`calculate_metrics`, with the same weights, and with the reals' features in its cache."""

    def __init__(self, task: Task, extractor: Extractor, folder: Path) -> None:
        self.reals = make_data(task.n).pixels("val")
        for k, image in enumerate(self.reals):
            save_png(from_uint8(image), folder / "reals" / f"{k:06d}.png")
        torch.save(load_network(_default_weights())[0].state_dict(), folder / "inception.pth")
        self.extractor, self.folder = extractor, folder

    def warm_up(self) -> None:
        """Fills the cache of the reals."""
        for k in range(2):
            save_png(from_uint8(self.reals[0]), self.folder / "warm" / f"{k}.png")
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
            kid_subset_size=subset_size(len(task.files), REALS),
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


def make_peers(task: Task, clip: tuple[str, str], folder: Path) -> dict[str, Any]:
    """What ours is measured against, ready to begin."""
    be_quiet()
    peers = {"torch-fidelity": TorchFidelity(task, load_extractor(), folder), "one by one": OneByOne(clip)}
    peers["torch-fidelity"].warm_up()
    peers["one by one"].networks(task.part(slice(0, 2)))
    return peers


def make_untouched(task: Task, clip: tuple[str, str]) -> dict[str, Any]:
    """Ours, for a process that gives freed memory back."""
    be_quiet()
    return {"ours": warm(Ours(task, clip), task)}


def warm(ours: Ours, task: Task) -> Ours:
    """Has its networks see two images."""
    two = read_pngs(task.files[:2])
    ours.extractor.features(two)
    ours.clip.score(from_uint8(two), task.prompts[:2])
    return ours


def be_quiet() -> None:
    """Without what torch-fidelity says of its loader, and open_clip of weights that are meant to be random."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    logging.disable(logging.WARNING)


def random_clip(folder: Path) -> tuple[str, str]:
    """A file of weights of the guide's architecture that nobody trained."""
    from open_clip import create_model
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = create_model("ViT-B-32")
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, folder / "clip.safetensors")
    return "ViT-B-32", str(folder / "clip.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate")
    parser.add_argument("--images", type=int, default=64, help="how many are scored")
    parser.add_argument("--clip", nargs=2, metavar=("MODEL", "PRETRAINED"), help="instead of a random ViT-B-32")
    options = parser.parse_args()
    n = options.images
    if n < 32:
        parser.error("--images must be 32 or more")
    be_quiet()
    torch.set_num_threads(1)
    keep_freed_memory()
    threadpool_limits(1)
    try:
        load_extractor()
    except AssetError as error:
        sys.exit(f"error: nothing was measured: {error}")

    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        clip = tuple(options.clip) if options.clip else random_clip(Path(folder))
        task = make_task(n, Path(folder))
        ours = warm(Ours(task, clip), task)
        untouched, peers = Apart(make_untouched, task, clip), Apart(make_peers, task, clip, Path(folder))
        size = -(-n // TURNS)
        untouched.timed("ours", "scores", task.part(slice(0, FEW)))
        peaks = {FEW: untouched.timed("ours", "peak")[1]}

        for turn in range(TURNS):
            part = task.part(slice(turn * size, (turn + 1) * size))
            few = part.part(slice(0, FEW))
            took = {}
            took["torch-fidelity"], expected = peers.timed("torch-fidelity", "metrics", part)
            took["ours"], (values, clip_scores) = timed(ours.scores, part)
            took["untouched"], same = untouched.timed("ours", "scores", part)
            took["one by one"], single = peers.timed("one by one", "networks", few)
            for key, value in expected.items():
                tolerance = 1e-3 if key.startswith("is") else 1e-6
                assert np.isclose(values[key], value, rtol=tolerance, atol=0), (key, values[key], value)
            assert same == (values, clip_scores), (same, values)
            assert np.allclose(single["clip"], clip_scores[:FEW], atol=1e-5)
            assert np.allclose(single["pool"], ours.extractor.features(read_pngs(few.files)).pool, atol=1e-4)
            for side, s in took.items():
                seconds.setdefault(side, []).append(s)
        peaks[size] = untouched.timed("ours", "peak")[1]
        peers.end()
        untouched.end()

        reals = make_data(n).pixels("val")
        real, generated = (ours.extractor.features(images).pool for images in (reals, read_pngs(part.files)))
        guide_seconds, guide = timed(guides_fid, real, generated)
        our_seconds, fid = timed(calculate_fid, real, generated)
        clip_seconds, _ = timed(load_clip, *clip)
        seen = from_uint8(read_pngs(few.files))
        clip_seconds_per_image = timed(ours.clip.score, seen, few.prompts)[0] / FEW
        # The guide's root of a singular matrix is not exact.
        assert np.isclose(fid, guide, rtol=1e-4), (fid, guide)

    half = {side: statistics.median(values) for side, values in seconds.items()}
    once = size * half["one by one"] / FEW + guide_seconds
    clip_name = "a random ViT-B-32" if not options.clip else ours.clip.name
    print(
        f"{size} images of 32 px, {REALS} reals, {clip_name}, Inception {ours.extractor.weights_hash[:8]}, one thread"
    )
    print(f"equal to torch-fidelity: {', '.join(expected)}; to one image per call: CLIP scores, features, FID")
    print(f"{'':52}{'CPU s':>9}{'images/CPU s':>14}{'ratio':>8}")

    def row(what: str, value: float, against: float | None = None, images: int = 0) -> None:
        rate = f"{images / value:14.2f}" if images else f"{'':14}"
        print(f"{what:52}{value:9.2f}{rate}" + (f"{value / against:8.2f}" if against else ""))

    without = half["ours"] - size * clip_seconds_per_image
    row("ours: CLIP, Inception and all metrics", half["ours"], images=size)
    row("  allocator untouched", half["untouched"], half["ours"], size)
    row("ours without CLIP", without, images=size)
    row("torch-fidelity: Inception and these metrics", half["torch-fidelity"], half["ours"], size)
    row("  against ours without CLIP", half["torch-fidelity"], without)
    row("one by one, CLIP loaded once", once, half["ours"], size)
    row("one by one as written, CLIP loaded for each image", once + size * clip_seconds, half["ours"], size)
    row("  of these one loading of CLIP", clip_seconds)
    row("  and the Fréchet distance by sqrtm", guide_seconds)
    row("Fréchet distance by calculate_fid", our_seconds)
    print("peak memory of ours: " + ", ".join(f"{peak:.0f} MB at {count} images" for count, peak in peaks.items()))


if __name__ == "__main__":
    main()
