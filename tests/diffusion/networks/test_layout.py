"""The layout of a network's weights: chosen by device and precision, and without effect on what is learned."""

import functools

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from diffusion.denoiser import Denoiser
from diffusion.modules.diffusion import Diffusion
from diffusion.networks.layout import lay_out
from diffusion.networks.unet import UNet
from diffusion.samplers import DDIM
from diffusion.schedules import Linear


def is_channels_last(network):
    return all(w.is_contiguous(memory_format=torch.channels_last) for w in network.parameters() if w.ndim == 4)


@pytest.fixture
def capability(monkeypatch):
    return lambda name: monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)


@pytest.mark.parametrize(
    ("device", "precision", "cpu", "last"),
    [
        ("cpu", "32-true", "AVX512", True),
        ("cpu", "32-true", "AVX2", False),
        ("cpu", "bf16-mixed", "AVX512", False),
        ("cuda", "32-true", "AVX512", False),
    ],
)
def test_channels_are_last_where_that_trains_faster(capability, device, precision, cpu, last):
    capability(cpu)
    network = torch.nn.Conv2d(4, 8, 3)
    lay_out(network, torch.device(device), precision)
    assert is_channels_last(network) is last


def test_the_trainer_lays_out_and_training_stays_the_same(capability, tmp_path):
    losses, networks = [], []
    for name in ("AVX512", "AVX2"):
        capability(name)
        torch.manual_seed(0)
        module = Diffusion(
            Denoiser(UNet(20, 3, 8, (32, 32, 32), family="handson"), Linear(20)),
            DDIM(2),
            functools.partial(torch.optim.SGD, lr=1e-2),  # Adam takes the sign of a gradient, also of rounding,
        )
        rows = [{"image": torch.randn(3, 8, 8), "index": torch.tensor(i)} for i in range(8)]
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, default_root_dir=tmp_path
        )
        trainer.fit(module, DataLoader(rows, batch_size=4))
        losses.append(trainer.callback_metrics["train/loss"])
        networks.append(module.denoiser.network)
    assert [is_channels_last(network) for network in networks] == [True, False]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for ours, plain in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
