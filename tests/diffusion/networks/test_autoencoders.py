"""The autoencoders, held against diffusers, torch's distributions and the published list."""

import diffusers
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F  # noqa: N812

from diffusion.errors import AntherError
from diffusion.networks.autoencoders import VAE, AutoencoderKL, Posterior


def test_kl_and_draws_are_those_of_a_gaussian():
    torch.manual_seed(0)
    mean, logvar = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    posterior = Posterior(mean, logvar)
    wanted = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    assert torch.allclose(posterior.kl(), wanted, rtol=1e-5)
    eps = torch.randn(4, 2, 3, 3)
    assert torch.allclose(posterior.at(eps), mean + logvar.exp().sqrt() * eps)


PUBLISHED = [f"encoder.{k}" for k in (0, 2, 4, 6)] + ["fc_mu", "fc_var", "decoder_input"]
PUBLISHED += [f"decoder.{k}" for k in (0, 2, 4, 6)]


def test_the_vae_of_seed_004():
    network = VAE()
    assert sum(p.numel() for p in network.parameters()) == 2_957_251
    assert list(network.state_dict()) == [f"{name}.{kind}" for name in PUBLISHED for kind in ("weight", "bias")]
    assert network.fc_mu.weight.shape == (128, 4096)


def test_the_vae_is_that_of_a_second_implementation():
    torch.manual_seed(0)
    network = VAE(3, 32, 10, (8, 16, 24))
    s, images = network.state_dict(), torch.rand(2, 3, 32, 32) * 2 - 1
    h = images / 2 + 0.5
    for k in (0, 2, 4):
        h = F.conv2d(h, s[f"encoder.{k}.weight"], s[f"encoder.{k}.bias"], 2, 1).clamp(min=0)
    h = h.reshape(2, -1)
    posterior = network.encode(images)
    assert torch.allclose(posterior.mean, h @ s["fc_mu.weight"].T + s["fc_mu.bias"], atol=1e-5)
    assert torch.allclose(posterior.logvar, h @ s["fc_var.weight"].T + s["fc_var.bias"], atol=1e-5)
    z = torch.randn(2, 10)
    h = (z @ s["decoder_input.weight"].T + s["decoder_input.bias"]).reshape(2, 24, 4, 4)
    for k in (0, 2, 4):
        h = F.conv_transpose2d(h, s[f"decoder.{k}.weight"], s[f"decoder.{k}.bias"], 2, 1)
        h = h.clamp(min=0) if k < 4 else 1 / (1 + torch.exp(-h))
    assert torch.allclose(network.decode(z), 2 * h - 1, atol=1e-5)


@pytest.mark.parametrize(("mult", "blocks", "latent"), [((1, 2, 2), 2, 4), ((1, 1), 1, 3), ((2, 1, 2, 2), 1, 4)])
def test_the_convolutional_one_is_that_of_diffusers(mult, blocks, latent):
    torch.manual_seed(0)
    n = len(mult)
    network = AutoencoderKL(3, 32, 32, mult, blocks, latent).eval()
    oracle = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=[32 * m for m in mult],
        layers_per_block=blocks,
        latent_channels=latent,
    ).eval()
    network.load_state_dict(oracle.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        posterior, wanted = network.encode(images), oracle.encode(images).latent_dist
        assert posterior.mean.shape[1:] == network.latent_shape == (latent, 32 // 2 ** (n - 1), 32 // 2 ** (n - 1))
        assert torch.allclose(posterior.mean, wanted.mean, atol=1e-5)
        assert torch.allclose(posterior.logvar, wanted.logvar, atol=1e-5)
        z = torch.randn(2, *network.latent_shape)
        assert torch.allclose(network.decode(z), oracle.decode(z).sample, atol=1e-4)
        # The published limits of the log-variance.
        network.quant_conv.bias.fill_(1e4)
        assert (network.encode(images).logvar == 20).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: VAE(3, 24), "must divide by 16"),
        (lambda: VAE(3, 64, 0), "latent_dim"),
        (lambda: AutoencoderKL(3, 30, 32, (1, 1, 1)), "must divide by 4"),
        (lambda: AutoencoderKL(3, 32, 32, (1,)), "needs 2 or more"),
        (lambda: AutoencoderKL(3, 32, 48, (1, 1)), "multiples of 32"),
        (lambda: AutoencoderKL(3, 32, 32, (1, 1), 0), "num_blocks"),
        (lambda: VAE().encode(torch.zeros(1, 3, 32, 32)), "takes images of 3 x 64 x 64 and was given 3 x 32 x 32"),
        (lambda: AutoencoderKL(3, 32, 32, (1, 1)).encode(torch.zeros(1, 1, 32, 32)), "was given 1 x 32 x 32"),
    ],
)
def test_impossible_settings(make, says):
    with pytest.raises(AntherError, match=says):
        make()
