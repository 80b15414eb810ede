"""Weights from elsewhere in the model that a config describes."""

import pytest
import torch

from diffusion.checkpoint import load_model
from diffusion.errors import AntherError
from diffusion.networks.autoencoders import VAE
from diffusion.networks.blocks import ResidualConv
from diffusion.networks.unet import UNet
from diffusion.rng import ImageRNG

SIZES = {"T": 10, "img_ch": 3, "img_size": 8, "down_chs": [32, 32, 64], "t_embed_dim": 8, "c_embed_dim": 4}


def config(network=None, kind="ClassifierFreeDiffusion", **changes):
    unet = {"_target_": "diffusion.networks.unet.UNet", **SIZES, "family": "course", **changes}
    schedule = {"_target_": "diffusion.schedules.Linear", "T": 10}
    node = {
        "_target_": f"diffusion.modules.diffusion.{kind}",
        "denoiser": {"_target_": "diffusion.denoiser.Denoiser", "network": network or unet, "schedule": schedule},
        "sampler": {"_target_": "diffusion.samplers.DDIM", "steps": 3},
        "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True},
    }
    if kind == "ClassifierFreeDiffusion":
        node["conditioner"] = {"_target_": "diffusion.conditioning.labels.Labels", "num_classes": 4}
    return {"name": "theirs", "module": node, "data": {"size": 8}}


def unet(**changes):
    torch.manual_seed(3)
    return UNet(**{**SIZES, "family": "course", **changes}).eval()


@pytest.mark.parametrize(
    "changes", [{"family": "course"}, {"family": "handson"}, {"family": "handson", "self_attention": True}]
)
@pytest.mark.parametrize("wrapped", ["plain", "compiled", "nested", "old format"])
def test_the_weights_are_those_of_the_file(changes, wrapped, tmp_path):
    theirs = unet(**changes)
    content = theirs.state_dict()
    if wrapped == "compiled":
        content = {f"_orig_mod.{key}": value for key, value in content.items()}
    if wrapped == "nested":
        content = {"epoch": 3, "model_state_dict": content}
    path = tmp_path / "theirs.pth"
    torch.save(content, path, _use_new_zipfile_serialization=wrapped != "old format")
    given = config(**changes)
    model = load_model(path, given)
    assert not model.training
    assert model.config == given
    assert model.denoiser.schedule.T == 10
    assert model.image_shape == (3, 8, 8)
    x, t, cond = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 1.0]), torch.eye(4)[:2]
    with torch.no_grad():
        assert torch.equal(model.denoiser.network(x, t, cond), theirs(x, t, cond))
    assert model.sample(["0", "3"], [1, 2]).isfinite().all()


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("content", "given", "says"),
    [
        (
            lambda: without(unet().state_dict(), "down1.model.0.model.0.bias"),
            config(),
            "missing: down1.model.0",
        ),
        (lambda: {**unet().state_dict(), "extra": torch.zeros(1)}, config(), "unexpected: extra"),
        (lambda: unet().state_dict(), config(family="handson"), "family course and the config describes handson"),
        (lambda: unet(family="handson").state_dict(), config(), "family handson and the config describes course"),
        (lambda: unet(c_embed_dim=5).state_dict(), config(), r"given config: .*size mismatch for c_embed1\.model\.0"),
        (lambda: unet(family="handson", self_attention=True).state_dict(), config(family="handson"), "mid_block.1.mha"),
        (lambda: unet(img_size=16).state_dict(), config(), "images of 16 pixels"),
        (lambda: {"weight": torch.zeros(1)}, config(), "neither published U-Net"),
        (lambda: [1, 2], config(), "no state dict"),
        (lambda: unet().state_dict(), {"name": "theirs"}, "describes no module"),
        (
            lambda: unet().state_dict(),
            {"module": {"_target_": "diffusion.networks.blocks.Embed", "i": 3, "o": 4}},
            "a Embed, which draws no images",
        ),
    ],
)
def test_what_does_not_fit_is_named(content, given, says, tmp_path):
    path = tmp_path / "theirs.pth"
    torch.save(content(), path)
    with pytest.raises(AntherError, match=says):
        load_model(path, given)


def test_any_other_network_takes_its_own_keys(tmp_path):
    node = {"_target_": "diffusion.networks.blocks.ResidualConv", "i": 3, "o": 8, "groups": 8}
    torch.manual_seed(3)
    theirs = ResidualConv(3, 8, 8)
    path = tmp_path / "theirs.pth"
    torch.save(theirs.state_dict(), path)
    network = load_model(path, config(node, "Diffusion")).denoiser.network
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in network.state_dict().items())
    for content, says in (
        (without(theirs.state_dict(), "conv1.model.0.bias"), "conv1.model.0.bias"),
        ([1], "holds no state dict"),
    ):
        torch.save(content, path)
        with pytest.raises(AntherError, match=says):
            load_model(path, config(node, "Diffusion"))


def test_the_published_autoencoder_loads_by_its_names(tmp_path):
    torch.manual_seed(3)
    theirs = VAE(3, 16, 4, (8, 16))
    torch.save(theirs.state_dict(), tmp_path / "best_vae.pt")
    node = {
        "_target_": "diffusion.modules.autoencoder.VariationalAutoencoder",
        "network": {
            "_target_": "diffusion.networks.autoencoders.VAE",
            "img_size": 16,
            "latent_dim": 4,
            "channels": [8, 16],
        },
        "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True},
    }
    model = load_model(tmp_path / "best_vae.pt", {"module": node, "name": "theirs"})
    assert torch.equal(model.sample(None, [5]), theirs.decode(ImageRNG([5]).randn((4,))))


def test_a_checkpoint_with_its_own_config_takes_no_other(tmp_path):
    torch.save(unet().state_dict(), tmp_path / "theirs.pth")
    model = load_model(tmp_path / "theirs.pth", config())
    ours = {"config": config(), "state_dict": model.state_dict()}
    averaged = {key: 2 * value for key, value in model.denoiser.network.state_dict().items()}
    for name, content, factor in (("plain", ours, 1), ("ema", {**ours, "ema": {"network": averaged}}, 2)):
        path = tmp_path / f"{name}.ckpt"
        torch.save(content, path)
        again = load_model(path)
        assert again.config == config()
        for key, value in again.denoiser.network.state_dict().items():
            assert torch.equal(value, factor * model.denoiser.network.state_dict()[key])
        with pytest.raises(AntherError, match="may not be overridden"):
            load_model(path, config())
    with pytest.raises(AntherError, match="no config inside"):
        load_model(tmp_path / "theirs.pth")


def test_damaged_and_missing_files_are_one_sentence(tmp_path):
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(AntherError, match="not a whole checkpoint"):
        load_model(tmp_path / "half.pth", config())
    with pytest.raises(AntherError, match="no checkpoint at"):
        load_model(tmp_path / "none.pth", config())
