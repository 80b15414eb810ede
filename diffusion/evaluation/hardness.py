"""Which images are hard and which labels look wrong, judged by networks that never saw them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from diffusion.assets import cache_dir
from diffusion.errors import AntherError
from diffusion.files import atomic
from diffusion.images import from_uint8
from diffusion.networks.classifier import LeNet, infer
from diffusion.rng import generator

Array = np.ndarray


def hardness(logits: Array) -> Array:
    """Entropy of the prediction in nats, H = -Σ p log p with p = softmax(logits); FiftyOne Brain's hardness.

    Args:
        logits: (N, K).

    Returns:
        float64 (N,), 0 to log K.
    """
    log_p = torch.from_numpy(np.asarray(logits, np.float64)).log_softmax(1)
    entropy: Array = -(log_p.exp() * log_p).sum(1).numpy()
    return entropy


def mistakenness(logits: Array, labels: Array) -> Array:
    """How likely a label is wrong: (m e^-H + 1) / 2, m = -1 where the prediction is the label and 1 elsewhere.

    FiftyOne Brain's mistakenness of predictions with logits: sure of another label gives 1, sure of the label 0.

    Args:
        logits: (N, K).
        labels: int (N,).

    Returns:
        float64 (N,), 0 to 1.
    """
    wrong = np.asarray(logits).argmax(1) != np.asarray(labels)
    scores: Array = (np.where(wrong, 1.0, -1.0) * np.exp(-hardness(logits)) + 1) / 2
    return scores


@dataclass(frozen=True)
class Judges:
    """How the networks are trained that judge images by logits.

    Attributes:
        folds: networks; each is trained on the images of all folds but its own, and judges its own.
        epochs: of each network.
        batch_size: images per step.
        lr: learning rate of Adam at the start; half a cosine leads to 0.
        seed: of folds, weights and order.

    Raises:
        AntherError: fewer than two folds, or nothing to train.
    """

    folds: int = 5
    epochs: int = 6
    batch_size: int = 128
    lr: float = 0.002
    seed: int = 0

    def __post_init__(self) -> None:
        if self.folds < 2 or self.epochs < 1 or self.batch_size < 1:
            raise AntherError(
                f"judges take folds of 2 or more and epochs and batch_size of 1 or more, not {self.folds}, "
                f"{self.epochs} and {self.batch_size}."
            )


def held_out_logits(images: Array, labels: Array, trained_on: int, judges: Judges, digest: str) -> Array:
    """Logits of every image by a network that was not trained on it; from the cache where they were computed before.

    The first images are cut into folds at random. Images that no network is trained on are dealt to the networks in
    turn, so that each of them, too, is judged by one network.

    Args:
        images: uint8 (N, 1, 28, 28).
        labels: int64 (N,), 0 to K - 1.
        trained_on: number of the first images that the networks are trained on.
        judges: how.
        digest: of the images and labels; part of the cache's key.

    Returns:
        float32 (N, K).
    """
    key = "-".join([digest[:16], str(trained_on), *(f"{value:g}" for value in asdict(judges).values())])
    path = cache_dir() / "held_out" / f"{key}.npy"
    classes = int(labels.max()) + 1
    try:
        logits: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        logits = np.empty((0, 0), np.float32)
    if not isinstance(logits, np.ndarray) or logits.shape != (len(images), classes) or logits.dtype != np.float32:
        logits = _judge(images, labels, trained_on, judges, classes)
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.save(file, logits)
    return logits


def folds_of(n: int, trained_on: int, judges: Judges) -> Array:
    """The fold, that is the judge, of each image: int64 (N,)."""
    folds = np.arange(n) % judges.folds
    folds[:trained_on] = folds[:trained_on][np.random.default_rng(judges.seed).permutation(trained_on)]
    return folds


def _judge(images: Array, labels: Array, trained_on: int, judges: Judges, classes: int) -> Array:
    from rich.progress import Progress

    folds = folds_of(len(images), trained_on, judges)
    logits = np.empty((len(images), classes), np.float32)
    with Progress(transient=True) as bar:
        task = bar.add_task("networks that judge", total=judges.folds * judges.epochs)
        for fold in range(judges.folds):
            theirs = np.flatnonzero(folds[:trained_on] != fold)
            network = _network(classes, [judges.seed, fold])
            for _ in _epochs(network, images, labels, theirs, judges, fold):
                bar.advance(task)
            own = np.flatnonzero(folds == fold)
            logits[own] = infer(network, from_uint8(torch.from_numpy(images[own])))[0].numpy()
            right = (logits[own].argmax(1) == labels[own]).mean()
            print(f"judge {fold + 1} of {judges.folds}: right on {right:.2%} of the images it never saw", flush=True)
    return logits


def _network(classes: int, seed: list[int]) -> LeNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.default_rng(seed).integers(2**31)))
        return LeNet(classes, digits=classes)


def _epochs(network: LeNet, images: Array, labels: Array, rows: Array, judges: Judges, fold: int) -> Iterator[None]:
    """Trains for one epoch per item."""
    optimizer = torch.optim.Adam(network.parameters(), lr=judges.lr)
    steps = -(-len(rows) // judges.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, judges.epochs * steps)
    network.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(judges.seed)  # dropout
        for epoch in range(judges.epochs):
            order = torch.randperm(len(rows), generator=generator(judges.seed, fold, epoch)).numpy()
            for start in range(0, len(rows), judges.batch_size):
                batch = rows[order[start : start + judges.batch_size]]
                target = torch.from_numpy(np.asarray(labels)[batch])
                loss = cross_entropy(network(from_uint8(torch.from_numpy(images[batch]))), target)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            yield
