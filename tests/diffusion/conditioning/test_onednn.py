from copy import deepcopy

import pytest
import torch

from diffusion.conditioning import onednn, openclip
from diffusion.conditioning.openclip import load_clip

VISION = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 64, "width": 24, "heads": 2, "layers": 2}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param({}, id="CLIP"),
        pytest.param({"embed_cls": True, "pad_id": 0}, id="CoCa, with a mask for each text"),
        pytest.param({"no_causal_mask": True}, id="no mask"),
    ],
)
def test_the_same_embeddings_as_open_clips_own_layers_from_the_same_weights(text):
    from open_clip import CustomTextCLIP

    torch.manual_seed(0)
    plain = CustomTextCLIP(embed_dim=8, vision_cfg=VISION, text_cfg={**TEXT, **text}).eval().requires_grad_(False)
    for name, weight in plain.named_parameters():
        if name.endswith("bias"):  # zero when they are made
            torch.nn.init.normal_(weight)
    fast = deepcopy(plain)
    onednn.by_onednn(fast)
    replaced = [type(part).__name__ for part in fast.modules() if type(part).__module__ == onednn.__name__]
    assert (replaced.count("_SelfAttention"), replaced.count("_Linear")) == (4, 16)
    assert sum(p.numel() for p in fast.parameters()) == sum(p.numel() for p in plain.parameters())

    images, tokens = torch.randn(3, 3, 16, 16), torch.randint(1, 64, (3, 12))
    tokens[1:, 7:] = 0  # padding
    with torch.no_grad():
        torch.testing.assert_close(fast.encode_image(images), plain.encode_image(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast.encode_text(tokens), plain.encode_text(tokens), rtol=1e-4, atol=1e-5)
        # As the layers of a CLIP that was moved to another device and back.
        fast.to("meta")
        assert fast.encode_image(images.to("meta")).device.type == "meta"


def test_towers_without_such_blocks_stay_as_they_are():
    from open_clip import CLIP

    torch.manual_seed(0)
    resnet = CLIP(
        embed_dim=8, vision_cfg={**VISION, "image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, text_cfg=TEXT
    )
    before = {name: type(part) for name, part in resnet.visual.named_modules()}
    onednn.by_onednn(resnet)
    assert {name: type(part) for name, part in resnet.visual.named_modules()} == before


@pytest.mark.parametrize("pays", [True, False])
def test_a_loaded_clip_has_them_where_they_pay(pays, monkeypatch):
    monkeypatch.setattr(openclip.onednn, "pays", lambda: pays)
    network = load_clip("anther-flowers-32", "embedded")._network
    assert any(isinstance(part, onednn._SelfAttention) for part in network.modules()) == pays


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False)],
)
def test_where_they_pay(vendor, capability, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(onednn, "_CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    onednn.pays.cache_clear()
    assert onednn.pays() == expected
    onednn.pays.cache_clear()
