from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from diffusion.errors import AntherError
from diffusion.networks.unet import UNet
from diffusion.networks.upstream import load_upstream

KEYS = Path(__file__).parent / "state_dict_keys"
FAMILIES = [("course", False), ("handson", False), ("handson", True)]
ids = ["course", "handson", "attention"]


def small(family="course", attention=False, img_size=12):
    torch.manual_seed(0)
    return UNet(300, 2, img_size, (32, 64, 96), 6, 5, family=family, self_attention=attention).eval()


@pytest.mark.parametrize(("family", "attention"), FAMILIES, ids=ids)
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("nest", [None, "state_dict", "model_state_dict"])
def test_files_of_both_families_come_back(tmp_path, family, attention, prefix, nest):
    network = small(family, attention)
    content = OrderedDict((prefix + key, value) for key, value in network.state_dict().items())
    torch.save({nest: content, "epoch": 3} if nest else content, tmp_path / "model.pt")
    loaded = load_upstream(tmp_path / "model.pt", T=300, img_size=12)
    assert (loaded.family, loaded.T, loaded.img_size, loaded.img_ch) == (family, 300, 12, 2)
    assert (loaded.t_embed_dim, loaded.c_embed_dim, loaded.training) == (6, 5, False)
    x_t, t, cond = torch.randn(2, 2, 12, 12), torch.tensor([1 / 300, 1.0]), torch.randn(2, 5)
    with torch.no_grad():
        assert torch.equal(loaded(x_t, t, cond), network(x_t, t, cond))
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())


@pytest.mark.parametrize(
    ("name", "T", "img_size", "expected"),
    [
        ("course_flowers", 400, None, ("course", 3, 32, 8, 512)),
        ("course_mnist28_T400_c10", 400, None, ("course", 1, 28, 8, 10)),
        ("handson_flowers", 400, 32, ("handson", 3, 32, 8, 512)),
        ("handson_flowers_attn", 400, 32, ("handson", 3, 32, 8, 512)),
        ("handson_mnist28_T300_c10", 300, 28, ("handson", 1, 28, 8, 10)),
    ],
)
def test_every_published_shape_list_is_recognised(name, T, img_size, expected):
    lines = [line.split("\t") for line in (KEYS / f"{name}.txt").read_text().splitlines() if line]
    state = {key: torch.zeros(1).expand([int(n) for n in shape.strip("(),").split(",")]) for key, shape in lines}
    loaded = load_upstream(state, T, img_size)
    assert (loaded.family, loaded.img_ch, loaded.img_size, loaded.t_embed_dim, loaded.c_embed_dim) == expected
    assert loaded.T == T


def test_the_state_dict_is_copied_and_no_random_numbers_are_used():
    state = small().half().state_dict()
    before = torch.get_rng_state()
    loaded = load_upstream(state, T=300)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    state = small().state_dict()
    loaded = load_upstream(state, T=300)
    with torch.no_grad():
        loaded.out[3].bias.fill_(7)
    assert not (state["out.3.bias"] == 7).any()


def test_what_is_not_in_the_file_is_asked_for():
    with pytest.raises(AntherError, match="pass T, 400 or 300"):
        load_upstream(small("course").state_dict())
    with pytest.raises(AntherError, match="pass T"):
        load_upstream(small("handson").state_dict(), img_size=12)
    with pytest.raises(AntherError, match="pass img_size, 32 or 28"):
        load_upstream(small("handson").state_dict(), T=300)
    with pytest.raises(AntherError, match="for images of 12 pixels and img_size = 28 was asked for"):
        load_upstream(small("course").state_dict(), T=300, img_size=28)


def test_every_missing_and_unexpected_key_is_named():
    state = dict(small().state_dict())
    lost = ["down0.conv1.model.0.weight", "dense_emb.4.bias", "out.3.weight"]
    for key in lost:
        del state[key]
    state |= {"extra.weight": torch.zeros(1), "up9.bias": torch.zeros(1)}
    with pytest.raises(AntherError) as error:
        load_upstream(state, T=300)
    assert all(key in str(error.value) for key in [*lost, "extra.weight", "up9.bias"])
    assert "down1" not in str(error.value)


def test_every_wrong_shape_is_named():
    state = dict(small("handson").state_dict())
    state["up1.conv_in.weight"] = torch.zeros(64, 7, 3, 3)
    state["out.3.bias"] = torch.zeros(5)
    with pytest.raises(AntherError) as error:
        load_upstream(state, T=300, img_size=12)
    assert "up1.conv_in.weight is (64, 7, 3, 3) and should be (64, 160, 3, 3)" in str(error.value)
    assert "out.3.bias is (5,) and should be (2,)" in str(error.value)
    assert "down0" not in str(error.value)


def test_shapes_that_cannot_be_measured():
    state = dict(small().state_dict())
    with pytest.raises(AntherError, match=r"t_emb1.model.0.weight is \(6,\)"):
        load_upstream(state | {"t_emb1.model.0.weight": torch.zeros(6)}, T=300)
    with pytest.raises(AntherError, match="takes 97 numbers, no square map"):
        load_upstream(state | {"dense_emb.0.weight": torch.zeros(64, 97)}, T=300)


@pytest.mark.parametrize(
    "content",
    [{}, {"conv.weight": torch.zeros(3)}, {"state_dict": {"epoch": 3}}, {"epoch": 3}, [1, 2], torch.zeros(3)],
    ids=["empty", "other", "nested", "number", "list", "tensor"],
)
def test_other_things_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(AntherError, match=r"belongs to neither published U-Net|holds no state dict"):
        load_upstream(tmp_path / "model.pt", T=300, img_size=12)


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_cannot_be_read(tmp_path, capsys):
    with pytest.raises(AntherError, match=r"cannot read .*absent.pt: No such file"):
        load_upstream(tmp_path / "absent.pt", T=300)
    for name, content in (("text.pt", b"not weights"), ("empty.pt", b""), ("cut.pt", b"PK\x03\x04 cut")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AntherError, match=f"{name} is no file of plain weights"):
            load_upstream(tmp_path / name, T=300)
    torch.save({"state_dict": Payload()}, tmp_path / "code.pt")
    with pytest.raises(AntherError, match="no file of plain weights"):
        load_upstream(tmp_path / "code.pt", T=300)
    assert "executed" not in capsys.readouterr().out
