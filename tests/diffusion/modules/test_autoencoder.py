import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from callbacks.ema import EMA
from callbacks.reconstructions import ReconstructionGrid
from callbacks.samples import SampleGrid
from datamodules.base import ImageDataModule, ImageTable
from diffusion.errors import AntherError
from diffusion.images import to_uint8
from diffusion.modules.autoencoder import VariationalAutoencoder
from diffusion.networks.autoencoders import VAE, AutoencoderKL
from diffusion.samplers import DDIM
from tests.callbacks.tiny_training import Dots, trainer

ADAM = functools.partial(torch.optim.Adam, lr=1e-3)


class Stripes(ImageDataModule):
    """Two-coloured 16-pixel images, a family that a small autoencoder can learn."""

    def __init__(self, n: int = 32, batch_size: int = 8) -> None:
        shape, split = (3, 16, 16), {"train": 0.75, "val": 0.25}
        super().__init__(name="stripes", image_shape=shape, batch_size=batch_size, seed=0, split=split)
        self.n = n

    def load(self) -> ImageTable:
        rng = np.random.default_rng(0)
        images = np.repeat(rng.integers(0, 256, (self.n, 3, 1, 2)).astype(np.uint8), 8, 3).repeat(16, 2)
        names = tuple(f"{k:03d}" for k in range(self.n))
        return ImageTable(images, torch.zeros(self.n, dtype=torch.long), ("stripes",), names, names, "stripes")


def vae(**options):
    torch.manual_seed(0)
    return VariationalAutoencoder(VAE(3, 16, 6, (8, 16)), ADAM, **options)


def kl_autoencoder(**options):
    torch.manual_seed(0)
    network = AutoencoderKL(3, 16, 32, (1, 1), 1, 2)
    return VariationalAutoencoder(network, ADAM, **{"loss": "l1", "kl_weight": 1e-6} | options)


def test_bce_is_the_published_loss():
    module, images, eps = vae(), torch.rand(4, 3, 16, 16) * 2 - 1, torch.randn(4, 6)
    reconstruction, kl, _ = module.losses(images, eps)
    mean, logvar = module.network.encode(images)
    decoded = (module.network.decode(mean + torch.exp(0.5 * logvar) * eps) + 1) / 2
    wanted = F.binary_cross_entropy(decoded, (images + 1) / 2, reduction="sum")
    assert reconstruction.shape == kl.shape == (4,)
    assert torch.allclose(reconstruction.sum(), wanted, rtol=1e-5)
    assert torch.allclose(kl.sum(), -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(), rtol=1e-5)


@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_the_other_losses_are_sums_over_an_image(loss):
    module, images, eps = kl_autoencoder(loss=loss), torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 2, 8, 8)
    reconstruction, _, means = module.losses(images, eps)
    mean, logvar = module.network.encode(images)
    error = module.network.decode(mean + torch.exp(0.5 * logvar) * eps) - images
    wanted = (error**2 / 2 if loss == "mse" else error.abs()).sum((1, 2, 3))
    assert torch.allclose(reconstruction, wanted, rtol=1e-5)
    assert torch.equal(means, mean)


class Losses(VariationalAutoencoder):
    """Keeps what it was trained with."""

    def _noise(self, keys) -> Tensor:
        self.keys = [*getattr(self, "keys", []), *map(tuple, keys)]
        return super()._noise(keys)


def test_training_lowers_the_loss_and_measures_the_latents(tmp_path):
    torch.manual_seed(0)
    module, data = Losses(VAE(3, 16, 6, (8, 16)), ADAM), Stripes()
    t = trainer(tmp_path, max_epochs=1)
    t.fit(module, data)
    first = float(t.callback_metrics["val/loss"])
    t = trainer(tmp_path, max_epochs=40)
    t.fit(module, data)
    metrics = t.callback_metrics
    assert float(metrics["val/loss"]) < 0.95 * first
    total = float(metrics["val/reconstruction"]) + float(metrics["val/kl"])
    assert float(metrics["val/loss"]) == pytest.approx(total, rel=1e-5)
    latents = module.to_latents(data.pixels("val").float() / 127.5 - 1)
    assert float(latents.std(correction=0)) == pytest.approx(1, rel=1e-4)
    images = module.from_latents(latents)
    assert torch.allclose(images, module.reconstruct(data.pixels("val").float() / 127.5 - 1), atol=1e-5)
    # Every sample of training has noise of its own, every validation image the same noise in every epoch.
    training = [key for key in module.keys[: 3 * 8 + 8] if key[0] == 0]
    validation = [key for key in module.keys if key[0] == 1]
    assert len(set(training)) == 24
    assert set(validation) == set(validation[:8])


def test_the_weight_of_the_kl_is_in_the_loss(tmp_path):
    for weight in (0.0, 2.5):
        t = trainer(tmp_path, limit_train_batches=0)
        (metrics,) = t.validate(vae(kl_weight=weight), Stripes(), verbose=False)
        assert metrics["val/loss"] == pytest.approx(
            metrics["val/reconstruction"] + weight * metrics["val/kl"], rel=1e-5
        )


def test_seed_k_draws_image_k_in_any_batch():
    module = vae().eval()
    together = module.sample(None, [3, 4, 5])
    assert together.shape == (3, 3, 16, 16)
    alone = torch.cat([module.sample(None, [seed]) for seed in (3, 4, 5)])
    assert (to_uint8(together).int() - to_uint8(alone).int()).abs().max() <= 1
    assert (together[0] - together[1]).abs().max() > 1e-4


def test_what_it_cannot_do_is_said():
    module = vae()
    for prompts, weight in ((["a rose"], None), (None, 2.0)):
        with pytest.raises(AntherError, match="no condition"):
            module.check_request(prompts, 1, weight)
        with pytest.raises(AntherError, match="no condition"):
            module.sample(prompts, [0], weight)
    with pytest.raises(AntherError, match="no sampler"):
        module.sample(None, [0], sampler=DDIM(2))
    with pytest.raises(AntherError, match="no sampler"):
        module.sample(None, [0], hook=print)
    module.check_request(None, 1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: vae(loss="huber"), "bce, mse or l1, not 'huber'"),
        (lambda: kl_autoencoder(loss="bce"), "AutoencoderKL does not give"),
        (lambda: vae(kl_weight=-1.0), "0 or more"),
        (lambda: ReconstructionGrid("x", images=0), "1 or more"),
    ],
)
def test_impossible_settings(make, says):
    with pytest.raises(AntherError, match=says):
        make()


def test_data_of_another_shape_stop_it_before_the_first_step(tmp_path):
    with pytest.raises(AntherError, match="data are 3 x 8 x 8 and the network takes 3 x 16 x 16"):
        trainer(tmp_path, max_epochs=1).fit(vae(), Dots())


@pytest.mark.parametrize("make", [vae, kl_autoencoder])
def test_pictures_and_averaged_weights(tmp_path, make):
    samples = SampleGrid(tmp_path / "samples", per_prompt=3, gif="never", every_n_epochs=1)
    pairs = ReconstructionGrid(tmp_path / "pairs", images=5, columns=4, every_n_epochs=1)
    module, data = make(), Stripes()
    t = trainer(tmp_path, samples, pairs, EMA(0.9), max_epochs=2)
    t.fit(module, data)
    assert [p.name for p in sorted((tmp_path / "samples").glob("*.png"))] == ["step-000003.png", "step-000006.png"]
    from PIL import Image

    drawn = np.asarray(Image.open(tmp_path / "pairs" / "step-000006.png").convert("RGB")).astype(int)
    assert drawn.shape == (4 * 34 + 2, 4 * 34 + 2, 3)
    originals = data.pixels("val")[:5].permute(0, 2, 3, 1).repeat_interleave(2, 1).repeat_interleave(2, 2).numpy()
    ema = next(c for c in t.callbacks if isinstance(c, EMA))
    with ema.swapped(module):
        back = to_uint8(module.eval().reconstruct(data.pixels("val")[:5].float() / 127.5 - 1))
    back = back.permute(0, 2, 3, 1).repeat_interleave(2, 1).repeat_interleave(2, 2).numpy()
    for k in range(5):
        top, left = 2 + 68 * (k // 4), 2 + 34 * (k % 4)
        assert (drawn[top : top + 32, left : left + 32] == originals[k]).all()
        assert np.abs(drawn[top + 34 : top + 66, left : left + 32] - back[k].astype(int)).max() <= 1
    t.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert saved["ema"]["updates"] == 6
    assert set(saved["ema"]["network"]) == set(module.network.state_dict())
    assert set(saved["state_dict"]) == {f"network.{k}" for k in saved["ema"]["network"]} | {"latent_scale"}


def test_only_the_images_shown_are_read(tmp_path, monkeypatch):
    module, data = vae(), Stripes(400)
    pairs = ReconstructionGrid(tmp_path / "pairs", images=5)
    read = []

    class Counted(np.ndarray):
        def __getitem__(self, key):
            found = super().__getitem__(key)
            read.append(len(found))
            return np.asarray(found)

    t = trainer(tmp_path, max_epochs=1)
    t.fit(module, data)
    monkeypatch.setattr(data, "_table", replace(data.table, images=data.table.images.view(Counted)))
    pairs.on_train_end(t, module)
    assert (tmp_path / "pairs" / f"step-{t.global_step:06d}.png").is_file()
    assert max(read) == 5


def test_an_animation_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(AntherError, match="gif=never"):
        trainer(tmp_path, SampleGrid(tmp_path, gif="last")).fit(vae(), Stripes())
