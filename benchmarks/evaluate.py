"""Scoring a folder of images: this project against torch-fidelity, and against the course's way, an image at a time.

Comparisons of the same files, in turns of other images, there and back over the sides; the reals' features are ready:

    ours             what evaluate.py does, from files to CLIP score, FID, KID, Inception Score and entropy, precision,
                     recall, diversity, nearest image and realism; with and without CLIP, and with and without glibc's
                     allocator set to keep freed memory, as our commands set it
    torch-fidelity   `calculate_metrics` with FID, KID, Inception Score, precision and recall; no CLIP. It builds its
                     network in each call, half a second here; ours is loaded once
    one by one       CLIP score and Inception features of one image per call, then the guide's formula of FID with
                     `scipy.linalg.sqrtm`; as the guide is written, `calculate_clip_score` also loads CLIP for each
                     image. Timed on 8 images and one loading; the cost of all is that times their number.

The values are compared first. Peak memory is that of the process with the allocator untouched, after the first 8 images
and after all. Seconds are CPU seconds, of children too, since machines are shared; with one thread on
all sides, since threads that wait for each other on a busy machine use seconds too. The last two have a process of
their own, since what ours sets for a whole process would help them too; ours with the allocator untouched has another.

Without `--clip` the CLIP has the guide's architecture, ViT-B-32, and random weights: what it costs is the same. So has
the last layer of the Inception where only the weights without it are to be had, on all sides: the Inception Scores are
compared, and mean nothing.

On a GPU, if there is one, all sides have their networks there, and seconds are the clock's.

    python -m benchmarks.evaluate [--images 32] [--turns 2] [--clip MODEL PRETRAINED] [--device cpu]
"""

import argparse
import logging
import resource
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
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
from benchmarks.where import device_option, print_where
from datamodules.drawn import DrawnFlowers
from diffusion.allocator import keep_freed_memory
from diffusion.assessment import calculate_clip_score, calculate_fid
from diffusion.assets import AssetError
from diffusion.conditioning import onednn
from diffusion.conditioning.openclip import load_clip
from diffusion.evaluation.distribution import subset_size
from diffusion.evaluation.inception import Extractor, _default_weights, load_extractor, load_network
from diffusion.evaluation.report import split_key
from diffusion.evaluation.scoring import Scorers, load_clip_scorer
from diffusion.fabric import set_precision
from diffusion.images import PngFiles, from_uint8, read_pngs, save_png
from diffusion.rng import generator

REALS, FEW = 32, 8


@dataclass
class Task:
    """What both sides score: the files and their prompts, of `n` images in all, with the weights of an Inception."""

    files: list[Path]
    prompts: list[str]
    n: int
    inception: Path

    def part(self, rows: slice) -> "Task":
        return Task(self.files[rows], self.prompts[rows], self.n, self.inception)


def make_data(n: int) -> DrawnFlowers:
    """Its training images, with noise, are in the place of generated ones; the others are the reals."""
    data = DrawnFlowers(seed=0, batch_size=REALS, n_train=n, n_val=REALS)
    data.prepare_data()
    data.setup("fit")
    return data


def make_task(size: int, turns: int, folder: Path) -> Task:
    """Writes the files, a folder of them for each turn."""
    n = size * turns
    data = make_data(n)
    files = [folder / f"{k // size}" / f"{k:06d}.png" for k in range(n)]
    for k, (path, image) in enumerate(zip(files, data.pixels("train"), strict=True)):
        save_png(from_uint8(image) + 0.3 * torch.randn(image.shape, generator=generator(k)), path)
    captions = [data.table.captions[row] for row in data.splits["train"]]
    return Task(files, captions, n, with_last_layer(folder / "inception.pth"))


def with_last_layer(path: Path) -> Path:
    """Writes the weights of the Inception, with a random last layer where they have none."""
    network, has_logits = load_network(_default_weights())
    state = dict(network.state_dict())
    if not has_logits:
        state["fc.weight"] = 0.1 * torch.randn(state["fc.weight"].shape, generator=generator(0))
        state["fc.bias"] = torch.zeros_like(state["fc.bias"])
    torch.save(state, path)
    return path


class Ours:
    """What evaluate.py does with the files of a run and a model with a condition, the reals' features being ready."""

    def __init__(self, task: Task, size: int, clip: tuple[str, str] | None, device: str) -> None:
        set_precision("32-true")
        data = make_data(task.n)
        chosen = {"split": "val", "few_images": "allow", "one_channel": "refuse", "missing": "refuse"}
        config = {
            "clip": None if clip is None else dict(zip(("model", "pretrained"), clip, strict=True)),
            "classifier": None,
            "num_images": size,
            "inception": {**chosen, "weights": str(task.inception)},
            "nearest": {"space": "inception", "split": "val"},
        }
        model = SimpleNamespace(conditioner=object())
        conditioned: Any = SimpleNamespace(model=model, other_splits=lambda datamodule: [])
        self.scorers = Scorers(config, conditioned, data, device)
        # They see two images: what is done once is done now.
        self.extractor, two = load_extractor(task.inception, device), read_pngs(task.files[:2])
        self.extractor.features(two)
        if clip is not None:
            self.clip = load_clip_scorer(*clip, device)
            self.clip.score(from_uint8(two), task.prompts[:2])

    def scores(self, task: Task) -> tuple[dict[str, float | None], list[float] | None]:
        """Every metric by its name without N, and the CLIP score of each image."""
        images, labels = PngFiles(task.files), [None] * len(task.files)
        scores = self.scorers.score(images, task.prompts, labels, {}, task.files[0].parent)
        values = {split_key(key).name: result.value for key, result in scores.results.items()}
        return values, scores.columns.get("clip_score")

    def peak(self) -> float:
        """MB that this process has had at most."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class OneByOne:
    """The loop of the notebooks: one image per call, by the network as it is published."""

    def __init__(self, inception: Path, clip: tuple[str, str], device: str) -> None:
        self.network, self.clip, self.device = load_network(inception)[0].to(device), clip, device

    def networks(self, task: Task) -> dict[str, np.ndarray]:
        scores, rows = [], []
        for path, prompt in zip(task.files, task.prompts, strict=True):
            scores.append(calculate_clip_score(path, prompt, *self.clip))
            pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)
            with torch.inference_mode():
                rows.append(self.network(pixels[None].to(self.device))[0].cpu().numpy())
        return {"clip": np.array(scores), "pool": np.concatenate(rows)}


class TorchFidelity:
    """`calculate_metrics`, with the same weights, and with the reals' features in its cache."""

    def __init__(self, task: Task, extractor: Extractor, folder: Path, device: str) -> None:
        self.reals = make_data(task.n).pixels("val")
        for k, image in enumerate(self.reals):
            save_png(from_uint8(image), folder / "reals" / f"{k:06d}.png")
        self.extractor, self.folder, self.inception, self.device = extractor, folder, task.inception, device

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
            feature_extractor_weights_path=str(self.inception),
            cuda=self.device != "cpu",
            batch_size=32,
            verbose=False,
            **metrics,
        )

    def metrics(self, task: Task) -> dict[str, float]:
        values = self._calculate(
            task.files[0].parent,
            isc=True,
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
        return {ours: values[theirs] for ours, theirs in names.items()}


def guides_fid(real: np.ndarray, generated: np.ndarray) -> float:
    """The assessment's formula, as it is written there."""
    mu_1, sigma_1 = real.mean(0), np.cov(real, rowvar=False)
    mu_2, sigma_2 = generated.mean(0), np.cov(generated, rowvar=False)
    root = scipy.linalg.sqrtm(sigma_1.dot(sigma_2)).real
    return float(((mu_1 - mu_2) ** 2).sum() + np.trace(sigma_1 + sigma_2 - 2 * root))


def make_peers(task: Task, clip: tuple[str, str], folder: Path, device: str) -> dict[str, Any]:
    """What ours is measured against, ready to begin."""
    be_quiet()
    onednn.pays = lambda: False  # one by one, CLIP has the layers that open_clip gave it
    fidelity = TorchFidelity(task, load_extractor(task.inception), folder, device)
    peers: dict[str, Any] = {"torch-fidelity": fidelity, "one by one": OneByOne(task.inception, clip, device)}
    peers["torch-fidelity"].warm_up()
    peers["one by one"].networks(task.part(slice(0, 2)))
    return peers


def make_untouched(task: Task, size: int, clip: tuple[str, str], device: str) -> dict[str, Any]:
    """Ours, for a process that gives freed memory back."""
    be_quiet()
    return {"ours": Ours(task, size, clip, device)}


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
    parser.add_argument("--images", type=int, default=32, help="how many are scored in a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--clip", nargs=2, metavar=("MODEL", "PRETRAINED"), help="instead of a random ViT-B-32")
    device_option(parser)
    options = parser.parse_args()
    if options.images < 16:
        parser.error("--images must be 16 or more")
    be_quiet()
    torch.set_num_threads(1)
    keep_freed_memory()
    threadpool_limits(1)
    try:
        load_extractor()
    except AssetError as error:
        sys.exit(f"error: nothing was measured: {error}")
    print_where("torch-fidelity", "open-clip-torch", device=options.device)
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    clip = tuple(options.clip) if options.clip else random_clip(folder)
    size, device = options.images, options.device
    task = make_task(size, options.turns, folder)
    ours, without = Ours(task, size, clip, device), Ours(task, size, None, device)
    untouched = Apart(make_untouched, task, size, clip, device, device=device)
    peers = Apart(make_peers, task, clip, folder, device, device=device)
    untouched.timed("ours", "scores", task.part(slice(0, FEW)))
    peaks = {FEW: untouched.timed("ours", "peak")[1]}
    seconds: dict[str, list[float]] = {}
    for turn in range(options.turns):
        part = task.part(slice(turn * size, (turn + 1) * size))
        few = part.part(slice(0, FEW))
        sides: dict[str, Callable[[], tuple[float, Any]]] = {
            "torch-fidelity": lambda part=part: peers.timed("torch-fidelity", "metrics", part),
            "ours": lambda part=part: timed(ours.scores, part, device=device),
            "without": lambda part=part: timed(without.scores, part, device=device),
            "untouched": lambda part=part: untouched.timed("ours", "scores", part),
            "one by one": lambda few=few: peers.timed("one by one", "networks", few),
        }
        results = {}
        for side, run in list(sides.items())[:: -1 if turn % 2 else 1]:
            took, results[side] = run()
            seconds.setdefault(side, []).append(took)
        check(results, ours.extractor.features(read_pngs(few.files)).pool, device)
    peaks[size] = untouched.timed("ours", "peak")[1]
    peers.end()
    untouched.end()

    real, generated = (
        ours.extractor.features(images).pool for images in (make_data(task.n).pixels("val"), read_pngs(part.files))
    )
    guide_seconds, guide = timed(guides_fid, real, generated)
    our_seconds, fid = timed(calculate_fid, real, generated)
    # The guide's root of a singular matrix is not exact.
    assert np.isclose(fid, guide, rtol=1e-4), (fid, guide)
    clip_seconds, _ = timed(load_clip, *clip, device, device=device)

    named = "a random ViT-B-32" if not options.clip else ours.clip.name
    weights = ours.extractor.weights_hash[:8]
    print(f"{options.turns} turns of {size} images of 32 px, {REALS} reals, {named}, Inception {weights}, one thread")
    compared = ", ".join(results["torch-fidelity"])
    print(f"equal to torch-fidelity: {compared}; to one image per call: CLIP scores, features, FID")
    per = "CPU s" if device == "cpu" else "s"
    print(f"{'':54}{per:>9}{f'images/{per}':>14}{'ratio':>8}")
    once = [size * each / FEW + guide_seconds for each in seconds["one by one"]]
    base, bare = seconds["ours"], seconds["without"]
    print_row("ours: CLIP, Inception and all metrics", base, size)
    print_row("  allocator untouched", seconds["untouched"], size, base)
    print_row("ours without CLIP", bare, size)
    print_row("torch-fidelity: Inception and these metrics", seconds["torch-fidelity"], size, base)
    print_row("  against ours without CLIP", seconds["torch-fidelity"], size, bare)
    print_row("one by one, CLIP loaded once", once, size, base)
    print_row("one by one as written, CLIP loaded for each image", [s + size * clip_seconds for s in once], size, base)
    print_row("  of these one loading of CLIP", [clip_seconds])
    print_row("  and the Fréchet distance by sqrtm", [guide_seconds])
    print_row("Fréchet distance by calculate_fid", [our_seconds])
    print("peak memory of ours: " + ", ".join(f"{peak:.0f} MB at {count} images" for count, peak in peaks.items()))


def check(results: dict[str, Any], pool: np.ndarray, device: str) -> None:
    """Sees that all sides found the same; on a GPU the others convolve in TF32, as torch has it there."""
    exact = device == "cpu"
    values, clip_scores = results["ours"]
    for key, value in results["torch-fidelity"].items():
        tolerance = 2e-2 if not exact else 1e-3 if key.startswith("is") else 1e-6
        assert np.isclose(values[key], value, rtol=tolerance, atol=0), (key, values[key], value)
    assert results["untouched"] == (values, clip_scores), results
    assert results["without"][0].items() <= values.items(), results
    assert np.allclose(results["one by one"]["clip"], clip_scores[:FEW], atol=1e-5 if exact else 1e-3)
    assert np.allclose(results["one by one"]["pool"], pool, atol=1e-4 if exact else 5e-2)


def print_row(what: str, values: list[float], images: int = 0, against: list[float] | None = None) -> None:
    """Medians: of the seconds, and of the ratio to another side in the same turn."""
    median = statistics.median(values)
    rate = f"{images / median:14.2f}" if images else ""
    ratios = (
        [] if against is None else [f"{statistics.median(a / b for a, b in zip(values, against, strict=True)):8.2f}"]
    )
    print(f"{what:54}{median:9.2f}{rate}{''.join(ratios)}")


if __name__ == "__main__":
    main()
