import pytest
import torch
from torch import nn

from diffusion.networks.annotated import AnnotatedUNet
from diffusion.networks.attention import Attends, FullAttention, LinearAttention, attention_maps
from diffusion.networks.blocks import SelfAttention
from diffusion.networks.residual import AttentionBlock
from diffusion.networks.unet import UNet


def random(layer):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer.eval()


LAYERS = [FullAttention(8, 2, 4), LinearAttention(8, 2, 4), SelfAttention(8, 2), AttentionBlock(32, 2)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_maps_are_distributions_over_the_keys(layer):
    random(layer)
    assert isinstance(layer, Attends)
    x = torch.randn(3, 32 if isinstance(layer, AttentionBlock) else 8, 4, 6)
    with torch.no_grad():
        weights = layer.weights(x)
    assert weights.shape == (3, 2, 24, 24)
    assert weights.min() >= 0
    assert torch.allclose(weights.sum(-1), torch.ones(3, 2, 24), atol=1e-5)
    assert weights.std() > 1e-3


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_the_output_is_what_the_map_mixes(layer):
    """Values under the map, by each layer's own projections, are its output."""
    random(layer)
    x = torch.randn(2, 32 if isinstance(layer, AttentionBlock) else 8, 3, 5)
    b, c, h, w = x.shape
    with torch.no_grad():
        weights = layer.weights(x)
        if isinstance(layer, FullAttention | LinearAttention):
            v = layer.to_qkv(x)[:, -8:].reshape(b, 2, 4, h * w)
            mixed = torch.einsum("bhij,bhdj->bhdi", weights, v).reshape(b, 8, h, w)
            expected = layer.to_out(mixed * (0.5 if isinstance(layer, LinearAttention) else 1))
        elif isinstance(layer, SelfAttention):
            tokens = x.flatten(2).mT
            v = nn.functional.linear(layer.ln(tokens), layer.mha.in_proj_weight[-c:], layer.mha.in_proj_bias[-c:])
            mixed = torch.einsum("bhij,bjhd->bihd", weights, v.unflatten(2, (2, -1))).flatten(2)
            expected = x + 0.5 * layer.mha.out_proj(mixed).mT.reshape(x.shape)
        else:
            v = layer.to_v(layer.group_norm(x).flatten(2).mT).unflatten(2, (2, -1))
            mixed = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
            expected = x + layer.to_out[0](mixed).mT.reshape(x.shape)
        assert torch.allclose(layer(x), expected, atol=1e-4)


def test_a_call_of_a_network_leaves_the_maps_of_all_its_layers():
    network = random(AnnotatedUNet(10, 3, 8, dim=8, attention=["linear", None, "full"]))
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 1.0])
    with attention_maps(network) as maps:
        assert maps == {}
        network(*inputs)
        assert list(maps) == ["downs.0.2.fn.fn", "downs.2.2.fn.fn", "mid_attn.fn.fn", "ups.0.2.fn.fn"]
        assert [tuple(m.shape[1:]) for m in maps.values()] == [(4, 64, 64), (4, 4, 4), (4, 4, 4), (4, 4, 4)]
        first = maps["mid_attn.fn.fn"]
        network(-inputs[0], inputs[1])
        assert not torch.equal(first, maps["mid_attn.fn.fn"])
    kept = dict(maps)
    network(*inputs)
    assert all(maps[name] is kept[name] for name in kept)


def test_the_published_middle_attention_is_one_of_them():
    network = UNet(10, 3, 8, (32, 32, 32), family="handson", self_attention=True)
    with attention_maps(network) as maps:
        network(torch.randn(1, 3, 8, 8), torch.ones(1))
    assert list(maps) == ["mid_block.1"]
