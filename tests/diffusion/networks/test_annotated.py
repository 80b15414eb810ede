"""The U-Net of seed 004 and its variants, held against the published lists and a second implementation."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from diffusion.errors import AntherError
from diffusion.networks.annotated import AnnotatedUNet

KEYS = Path(__file__).parent / "state_dict_keys"
PUBLISHED = {
    "convnext": ({}, 14_908_925),
    "resnet": ({"block": "resnet", "act": "silu"}, 8_260_171),
    "noattention": ({"attention": [None] * 3, "middle_attention": None}, 14_446_205),
}


def small(**options):
    torch.manual_seed(0)
    network = AnnotatedUNet(**{"T": 200, "img_ch": 3, "img_size": 16, "dim": 16} | options).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # norms begin as ones and zeros, which would hide a swap
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_count_are_the_published_ones(name):
    options, count = PUBLISHED[name]
    with torch.device("meta"):
        network = AnnotatedUNet(200, 3, 64, **options)
    lines = [line.split("\t") for line in (KEYS / f"imgendiff_{name}.txt").read_text().splitlines() if line]
    ours = [[key, str(tuple(value.shape))] for key, value in network.state_dict().items()]
    assert ours == lines
    assert sum(p.numel() for p in network.parameters()) == count


class Reference:
    """The same network as functions of a state dict, from its description; time is the index 0..T-1."""

    def __init__(self, state, act, time_act, norm):
        self.s, self.norm = state, norm
        functions = {"gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2, "relu": lambda x: x.clamp(min=0)}
        functions["silu"] = lambda x: x / (1 + torch.exp(-x))
        self.act, self.time_act = functions[act], functions[time_act]

    def conv(self, x, stem, **options):
        weight = self.s[f"{stem}.weight"]
        return F.conv2d(x, weight, self.s.get(f"{stem}.bias"), padding=options.pop("padding", weight.shape[-1] // 2))

    def group_norm(self, x, stem, groups=1):
        b, c, h, w = x.shape
        parts = x.reshape(b, groups, -1)
        mean, var = parts.mean(2, keepdim=True), parts.var(2, unbiased=False, keepdim=True)
        x = ((parts - mean) / (var + 1e-5).sqrt()).reshape(b, c, h, w)
        return x * self.s[f"{stem}.weight"][None, :, None, None] + self.s[f"{stem}.bias"][None, :, None, None]

    def linear(self, x, stem):
        return x @ self.s[f"{stem}.weight"].T + self.s[f"{stem}.bias"]

    def block(self, x, stem, time):
        shift = 0 if time is None else self.linear(self.act(time), f"{stem}.mlp.1")[:, :, None, None]
        shortcut = self.conv(x, f"{stem}.res_conv") if f"{stem}.res_conv.weight" in self.s else x
        if f"{stem}.ds_conv.weight" in self.s:
            kernels, bias = self.s[f"{stem}.ds_conv.weight"], self.s[f"{stem}.ds_conv.bias"]
            h = F.conv2d(x, kernels, bias, padding=3, groups=x.shape[1]) + shift
            h = self.conv(self.group_norm(h, f"{stem}.net.0"), f"{stem}.net.1")
            h = self.conv(self.group_norm(self.act(h), f"{stem}.net.3"), f"{stem}.net.4")
        else:
            h = self.act(self.group_norm(self.conv(x, f"{stem}.block1.proj"), f"{stem}.block1.norm", 8)) + shift
            h = self.act(self.group_norm(self.conv(h, f"{stem}.block2.proj"), f"{stem}.block2.norm", 8))
        return h + shortcut

    def attention(self, x, stem):
        if f"{stem}.fn.fn.to_qkv.weight" not in self.s:
            return x
        y = self.group_norm(x, f"{stem}.fn.norm") if self.norm == "pre" else x
        b, _, h, w = x.shape
        q, k, v = self.conv(y, f"{stem}.fn.fn.to_qkv").reshape(b, 3, 4, 32, h * w).unbind(1)
        if f"{stem}.fn.fn.to_out.1.weight" in self.s:  # linear
            context = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
            mixed = torch.einsum("bhde,bhdn->bhen", context, q.softmax(-2) / 32**0.5).reshape(b, 128, h, w)
            y = self.group_norm(self.conv(mixed, f"{stem}.fn.fn.to_out.0"), f"{stem}.fn.fn.to_out.1")
        else:
            mixing = torch.einsum("bhdi,bhdj->bhij", q / 32**0.5, k).softmax(-1)
            mixed = torch.einsum("bhij,bhdj->bhdi", mixing, v).reshape(b, 128, h, w)
            y = self.conv(mixed, f"{stem}.fn.fn.to_out")
        return x + (y if self.norm == "pre" else self.group_norm(y, f"{stem}.fn.norm"))

    def __call__(self, x, index, levels):
        s, half = self.s, self.s["time_mlp.1.weight"].shape[1] // 2
        angles = [index * math.exp(-k * math.log(10000) / (half - 1)) for k in range(half)]
        features = torch.stack([*map(torch.sin, angles), *map(torch.cos, angles)], 1)
        time = self.linear(self.time_act(self.linear(features, "time_mlp.1")), "time_mlp.3")
        x, kept = self.conv(x, "init_conv"), []
        for k in range(levels):
            attends = int(f"downs.{k}.2.fn.norm.weight" in s)
            x = self.block(self.block(x, f"downs.{k}.0", time), f"downs.{k}.1", time)
            x = self.attention(x, f"downs.{k}.2")
            kept.append(x)
            if k < levels - 1:
                stem = f"downs.{k}.{2 + attends}"
                x = F.conv2d(x, s[f"{stem}.weight"], s[f"{stem}.bias"], stride=2, padding=1)
        x = self.attention(self.block(x, "mid_block1", time), "mid_attn")
        x = self.block(x, "mid_block2", time)
        for k in range(levels - 1):
            attends = int(f"ups.{k}.2.fn.norm.weight" in s)
            x = torch.cat([x, kept[levels - 1 - k]], 1)
            x = self.block(self.block(x, f"ups.{k}.0", time), f"ups.{k}.1", time)
            x = self.attention(x, f"ups.{k}.2")
            stem = f"ups.{k}.{2 + attends}"
            x = F.conv_transpose2d(x, s[f"{stem}.weight"], s[f"{stem}.bias"], stride=2, padding=1)
        return self.conv(self.block(x, "final_conv.0", None), "final_conv.1")


VARIANTS = [
    {},
    {"block": "resnet", "act": "silu"},
    {"attention": [None] * 3, "middle_attention": None},
    {"norm": "post", "act": "relu", "time_act": "silu"},
    {"block": "resnet", "act": "gelu", "norm": "post", "attention": [None, "full", "linear"]},
    {"attention": ["linear", None, "full"], "middle_attention": "linear"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=[",".join(map(str, v.values())) or "published" for v in VARIANTS])
def test_the_forward_pass_is_that_of_a_second_implementation(options):
    network = small(**options)
    default = {"act": "gelu", "time_act": "gelu", "norm": "pre"}
    reference = Reference(network.state_dict(), **{key: options.get(key, value) for key, value in default.items()})
    x_t, index = torch.randn(3, 3, 16, 16), torch.tensor([0.0, 6.0, 199.0])
    with torch.no_grad():
        ours = network(x_t, (index.double() + 1) / 200)
        assert torch.allclose(ours, reference(x_t, index, 3), atol=2e-4 * float(ours.abs().max()))


def test_what_has_no_parameters_still_makes_another_network():
    x_t, t = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 1.0])
    base = small()
    outputs = []
    for options in ({}, {"act": "silu"}, {"act": "relu"}, {"norm": "post"}, {"time_act": "relu"}):
        other = small(**options)
        other.load_state_dict(base.state_dict())
        with torch.no_grad():
            outputs.append(other(x_t, t))
    assert all((a - b).abs().max() > 1e-3 for k, a in enumerate(outputs) for b in outputs[:k])


def test_a_condition_is_added_to_time_and_zeros_mean_none():
    network = small(c_embed_dim=5)
    x_t, t, cond = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 1.0]), torch.randn(2, 5)
    with torch.no_grad():
        assert torch.equal(network(x_t, t), network(x_t, t, torch.zeros(2, 5)))
        assert (network(x_t, t, cond) - network(x_t, t)).abs().max() > 1e-3
        swapped = network(x_t.flip(0), t.flip(0), cond.flip(0)).flip(0)
        assert torch.allclose(swapped, network(x_t, t, cond), atol=1e-4)
    with pytest.raises(AntherError, match="conditions of width 5 and was given 4"):
        network(x_t, t, torch.randn(2, 4))
    with pytest.raises(AntherError, match="conditions of width 0 and was given 5"):
        small()(x_t, t, cond)


@pytest.mark.parametrize("options", [{}, {"block": "resnet", "c_embed_dim": 2}])
def test_every_trainable_parameter_has_a_gradient(options):
    network = small(**options)
    cond = torch.randn(2, 2) if options else None
    network(torch.randn(2, 3, 16, 16), torch.tensor([0.5, 1.0]), cond).square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert without == ["final_conv.0.mlp.1.weight", "final_conv.0.mlp.1.bias"]
    assert not any(dict(network.named_parameters())[name].requires_grad for name in without)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"img_size": 18}, "must divide by 4"),
        ({"dim": 20}, "multiple of 8"),
        ({"block": "vit"}, "convnext or resnet"),
        ({"attention": ["linear", "full"]}, "2 entries for 3 levels"),
        ({"attention": ["linear", "sparse", None]}, "'sparse'"),
        ({"middle_attention": "sparse"}, "'sparse'"),
        ({"norm": "both"}, "pre or post"),
        ({"act": "tanh"}, "network.act.* 'tanh'"),
        ({"time_act": "tanh"}, "network.time_act 'tanh'"),
        ({"c_embed_dim": -1}, "c_embed_dim"),
    ],
)
def test_impossible_settings(options, says):
    with pytest.raises(AntherError, match=says):
        small(**options)


def test_images_of_another_shape_are_refused():
    with pytest.raises(AntherError, match="takes images of 3 x 16 x 16 and was given 3 x 32 x 32"):
        small()(torch.randn(1, 3, 32, 32), torch.ones(1))
