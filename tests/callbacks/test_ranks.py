"""All callbacks at once on one, two and three ranks: nobody waits for ever, and every number is that of one rank."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from callbacks.clip import GenerationClipScore
from callbacks.ema import EMA
from callbacks.embeddings import BottleneckEmbeddings
from callbacks.fid import GenerationFid
from callbacks.nan_guard import NanGuard
from callbacks.record import RunRecord
from callbacks.samples import SampleGrid
from callbacks.throughput import Throughput
from callbacks.timestep_loss import TimestepLoss
from datamodules.base import ImageDataModule, ImageTable
from diffusion.errors import AntherError
from diffusion.loggers import CSVLog
from diffusion.modules.autoencoder import VariationalAutoencoder
from diffusion.modules.classification import Classification
from diffusion.networks.autoencoders import VAE
from diffusion.networks.classifier import LeNet
from tests.callbacks.tiny_training import Corners, Dots, module, trainer

ROOT = Path(__file__).parents[2]


class Digits(ImageDataModule):
    """Random pictures; 19 of them are validated."""

    def __init__(self) -> None:
        split = {"train": 19 / 38, "val": 19 / 38}
        super().__init__(name="digits", image_shape=(1, 28, 28), batch_size=4, seed=0, split=split)

    def load(self) -> ImageTable:
        rng = np.random.default_rng(1)
        return ImageTable(
            images=rng.integers(0, 256, (38, 1, 28, 28), dtype=np.uint8),
            labels=torch.from_numpy(rng.integers(0, 10, 38)),
            class_names=tuple("0123456789"),
            names=tuple(f"train/{i:05d}" for i in range(38)),
            captions=tuple(map(str, range(38))),
            digest="digits",
        )


def dots(world: int) -> Dots:
    # Twelve images a step; nine are validated, two at a time: five on one of two ranks, in three batches, and four on
    # the other, in two.
    data = Dots(n=27, batch_size=6 // world)
    data.val_batch_size = 2
    return data


def train(folder: Path, world: int) -> None:
    """Each rank writes what it logged. The learning rate is 0: no rounding of gradients blurs the comparison."""
    ranks: dict[str, Any] = {"devices": world, "strategy": "ddp" if world > 1 else "auto"}
    t = trainer(
        folder,
        EMA(),
        NanGuard(),
        Throughput(),
        RunRecord(),
        SampleGrid(folder / "samples", ["a daisy"], [2.0], every_n_epochs=1),
        GenerationClipScore(
            ["a photo of a daisy", "two roses", "a tulip"], [2.0], "anther-flowers-32", "embedded", every_n_epochs=1
        ),
        GenerationFid(num_images=25, prompts=["a daisy", "two roses"], every_n_epochs=1, batch_size=7),
        BottleneckEmbeddings(folder / "embeddings", prompts=["a daisy"], every_n_epochs=1),
        BottleneckEmbeddings(folder / "validated", source="val", every_n_epochs=1),
        TimestepLoss(folder / "plots"),
        LastCheckpoint(folder / "checkpoints", every_n_steps=1, share=1.0),
        BestCheckpoint(dirpath=folder / "checkpoints", filename="best{epoch}", monitor="val/clip_score", mode="max"),
        logger=CSVLog(folder / "metrics.csv"),
        **ranks,
    )
    with (
        patch("callbacks.fid.load_extractor", lambda *_: Corners()),
        patch("callbacks.fid.check_number", lambda *_: None),
    ):
        t.fit(module(lr=0.0), datamodule=dots(world))
    values = {name: float(value) for name, value in t.callback_metrics.items() if name.startswith("val/")}
    torch.manual_seed(0)
    classifier = Classification(LeNet(classes=10), functools.partial(torch.optim.SGD, lr=0.1))
    found = trainer(folder, **ranks).validate(classifier, Digits(), verbose=False)[0]
    values |= {f"classifier {name}": value for name, value in found.items()}
    torch.manual_seed(0)
    autoencoder = VariationalAutoencoder(VAE(1, 28, 4, (8, 8)), functools.partial(torch.optim.SGD, lr=0.1))
    found = trainer(folder, **ranks).validate(autoencoder, Digits(), verbose=False)[0]
    values |= {f"autoencoder {name}": value for name, value in found.items()}
    (folder / f"rank{t.global_rank}.json").write_text(json.dumps(values))


@pytest.mark.slow
def test_ranks_agree_with_one_another_and_with_one_alone(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    train(tmp_path / "1", 1)
    alone = json.loads((tmp_path / "1" / "rank0.json").read_text())
    assert {"val/loss", "val/clip_score", "val/fid_25", "val/loss_by_t/0.95", "classifier val/accuracy"} <= set(alone)
    assert {f"autoencoder val/{name}" for name in ("loss", "reconstruction", "kl")} <= set(alone)
    embedded = np.load(tmp_path / "1" / "validated" / "step-000006.npz")
    assert len(embedded["ids"]) == 9
    for world in (2, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command = [*torchrun, "-m", "tests.callbacks.test_ranks", str(folder), str(world)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        for rank in range(world):
            values = json.loads((folder / f"rank{rank}.json").read_text())
            assert values == pytest.approx(alone, rel=1e-5), f"rank {rank} of {world}"
        assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
        assert (folder / "samples" / "step-000006.gif").exists()
        assert (folder / "embeddings" / "step-000006.npz").exists()
        ours = np.load(folder / "validated" / "step-000006.npz")
        assert list(ours["ids"]) == list(embedded["ids"])
        np.testing.assert_allclose(ours["embeddings"], embedded["embeddings"], rtol=1e-4, atol=1e-6)


def test_fewer_validation_images_than_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Dots(n=9)
    data.setup()
    monkeypatch.setattr(data, "_rank", lambda: (3, 4))
    with pytest.raises(AntherError, match=r"3 images of the split val are too few for 4 processes"):
        data.val_dataloader()


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
