"""The traps that were measured before anything was built: the rows that no other test springs.

trap                                            its test
a sweep with several ranks                      e2e/test_ranks.py, diffusion/test_sweeps.py
torchrun and ${now:}                            e2e/test_ranks.py: each sweep's folder has the time in its name
samples counted twice on several ranks          datamodules/test_image_datamodule.py, callbacks/test_ranks.py
save_hyperparameters and weights_only           here
an average of the whole module, without warm-up callbacks/test_ema.py
a metric network in state dict and optimizer    here
resizing and rounding before Inception          diffusion/evaluation/test_inception.py, test_distribution.py
FID of few images                               here; its refusal in diffusion/evaluation/test_distribution.py
Brain's inverted score, and its own embeddings  diffusion/curation/test_brain.py
CLIP score without transformers                 diffusion/evaluation/test_clip_score.py
FiftyOne without a database                     diffusion/curation/test_database.py
"""

import pickle
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from callbacks.checkpoints import LastCheckpoint
from callbacks.clip import GenerationClipScore
from callbacks.ema import EMA
from diffusion import checkpoint
from diffusion.evaluation.distribution import fid, kid
from tests.callbacks.tiny_training import Dots, module, trainer


class Careless(lightning.LightningModule):
    """What a tutorial would write."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = network
        self.fid = FrechetInceptionDistance(nn.Flatten(), input_img_size=(3, 8, 8))


def test_hyperparameters_are_saved_plain(tmp_path: Path) -> None:
    theirs = Careless(nn.Linear(1, 1))
    torch.save({"hyper_parameters": dict(theirs.hparams)}, tmp_path / "theirs.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "theirs.ckpt", weights_only=True)
    ours = module()
    ours.config = {"module": {"lr": 0.001}, "seed": 0}
    trainer(tmp_path, EMA(), LastCheckpoint(tmp_path), max_steps=1).fit(ours, datamodule=Dots())
    content = checkpoint.read(tmp_path / "last.ckpt")  # with weights_only
    assert content["config"] == ours.config
    assert "hyper_parameters" not in content


def test_networks_that_only_measure_are_not_trained_saved_or_averaged(tmp_path: Path) -> None:
    class Inception(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(192, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(images.flatten(1).float())
            return out

    theirs = Careless(nn.Linear(1, 1))
    theirs.fid = FrechetInceptionDistance(Inception(), input_img_size=(3, 8, 8))
    assert any("inception" in name for name in theirs.state_dict())
    assert len(list(theirs.parameters())) > len(list(theirs.network.parameters()))
    ours = module()
    score = GenerationClipScore(["a daisy"], [1.0], "anther-flowers-32", "embedded", every_n_epochs=1)
    t = trainer(tmp_path, EMA(), score, LastCheckpoint(tmp_path), max_epochs=1)
    t.fit(ours, datamodule=Dots())
    assert "val/clip_score" in t.callback_metrics
    network = ours.denoiser.network
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(content["state_dict"]) == {f"denoiser.network.{name}" for name in network.state_dict()}
    assert set(content["ema"]["network"]) == set(network.state_dict())
    trained = [p for group in t.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in network.parameters()}


def test_fid_of_few_images_is_large_for_the_right_distribution_and_kid_is_not() -> None:
    """A Gaussian in 64 dimensions against itself; the number of images alone makes the difference."""
    rng = np.random.default_rng(0)
    found = {n: fid(rng.normal(size=(n, 64)), np.zeros(64), np.eye(64)) for n in (80, 800, 8000)}
    assert found[80] > 8 * found[800] > 60 * found[8000]
    for n in (80, 800):
        mean, deviation = kid(rng.normal(size=(n, 64)), rng.normal(size=(n, 64)))
        assert abs(mean) < 3 * max(deviation, 0.01)
