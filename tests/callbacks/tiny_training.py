"""A real training that takes a second: what the tests of this folder train."""

import functools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import Trainer

from datamodules.base import ImageDataModule, ImageTable
from diffusion.checkpoint_io import AtomicCheckpointIO
from diffusion.conditioning.labels import Labels
from diffusion.denoiser import Denoiser
from diffusion.evaluation.inception import Features
from diffusion.modules.diffusion import ClassifierFreeDiffusion, Diffusion
from diffusion.networks.unet import UNet
from diffusion.samplers import DDIM
from diffusion.schedules import Linear

CLASSES = ("daisy", "roses", "sunflowers", "tulips")


class Dots(ImageDataModule):
    """Random 8-pixel images of four classes."""

    def __init__(self, n: int = 24, batch_size: int = 4) -> None:
        super().__init__(
            name="dots", image_shape=(3, 8, 8), batch_size=batch_size, seed=0, split={"train": 2 / 3, "val": 1 / 3}
        )
        self.n = n

    def load(self) -> ImageTable:
        images = np.random.default_rng(0).integers(0, 256, (self.n, 3, 8, 8), dtype=np.uint8)
        labels = torch.arange(self.n) % len(CLASSES)
        return ImageTable(
            images=images,
            labels=labels,
            class_names=CLASSES,
            names=tuple(f"train/{i:05d}" for i in range(self.n)),
            captions=tuple(f"A photo of a {CLASSES[k]}" for k in labels),
            digest="dots",
        )


class Corners:
    """In the place of Inception: eight numbers of an image."""

    dim = 8
    protocol: ClassVar[dict[str, Any]] = {"extractor": "corners"}

    def check(self, images: torch.Tensor) -> None: ...

    def part_features(self, images: torch.Tensor) -> Features:
        return Features(images[:, :2, :2, :2].flatten(1).numpy().astype(np.float32) / 255)


def module(conditional: bool = True, lr: float = 1e-3, scheduler: Any = None, T: int = 10) -> Diffusion:
    torch.manual_seed(0)
    network = UNet(T=T, img_ch=3, img_size=8, down_chs=(32, 32, 32), c_embed_dim=4, family="handson")
    denoiser = Denoiser(network, Linear(T=T))
    optimizer = functools.partial(torch.optim.Adam, lr=lr)
    sampler = DDIM(steps=3)
    if conditional:
        return ClassifierFreeDiffusion(denoiser, sampler, optimizer, Labels(CLASSES), scheduler=scheduler)
    return Diffusion(denoiser, sampler, optimizer, scheduler)


def nervous_plateau(optimizer: torch.optim.Optimizer, total_steps: int | None) -> dict[str, Any]:
    """Lowers the rate after every epoch whose loss fell, so that each missed call shows."""
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.7, patience=0)
    return {"scheduler": scheduler, "monitor": "val/loss", "interval": "epoch", "strict": False}


def trainer(tmp_path: Path, *callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": tmp_path,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
        "max_epochs": -1 if "max_steps" in options else 2,
        "plugins": [AtomicCheckpointIO()],
    }
    return Trainer(callbacks=list(callbacks), **defaults | options)


def weights(m: Diffusion) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in m.denoiser.network.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
