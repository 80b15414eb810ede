"""The U-Nets against a second implementation, written from the description of the published ones alone."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from einops import rearrange

from diffusion.errors import AntherError
from diffusion.networks.blocks import RearrangePool, conv_of_doubled, sinusoidal
from diffusion.networks.unet import UNet

KEYS = Path(__file__).parent / "state_dict_keys"
FLOWERS = {"T": 400, "img_ch": 3, "img_size": 32, "down_chs": (256, 256, 512), "t_embed_dim": 8, "c_embed_dim": 512}
MNIST = {"img_ch": 1, "img_size": 28, "down_chs": (64, 64, 128), "t_embed_dim": 8, "c_embed_dim": 10}
PUBLISHED = {
    "course_flowers": (44_900_355, {**FLOWERS, "family": "course"}),
    "handson_flowers": (34_122_243, {**FLOWERS, "family": "handson"}),
    "handson_flowers_attn": (39_895_555, {**FLOWERS, "family": "handson", "self_attention": True}),
    "handson_mnist28_T300_c10": (2_115_841, {**MNIST, "T": 300, "family": "handson"}),
    "course_mnist28_T400_c10": (2_547_457, {**MNIST, "T": 400, "family": "course"}),
}
FAMILIES = [("course", False), ("handson", False), ("handson", True)]
ids = ["course", "handson", "attention"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    count, options = PUBLISHED[name]
    with torch.device("meta"):
        network = UNet(**options)
    assert sum(p.numel() for p in network.parameters()) == count
    lines = (KEYS / f"{name}.txt").read_text().splitlines()
    published = dict(line.split("\t") for line in lines if line)
    assert {key: str(tuple(value.shape)) for key, value in network.state_dict().items()} == published


def test_the_courses_network_is_the_default():
    with torch.device("meta"):
        plain = UNet(400, 3, 32)
    assert sum(p.numel() for p in plain.parameters()) == 44_900_355
    assert (plain.T, plain.img_ch, plain.img_size, plain.c_embed_dim) == (400, 3, 32, 512)


# A second implementation --------------------------------------------------------------------------------------------


class Reference:
    """Both families as functions of a state dict; t is the published index 0..T-1, mask 1 keeps the context."""

    def __init__(self, state, T):
        self.state, self.T = state, T

    def conv_norm_gelu(self, x, stem, groups):
        s = self.state
        x = F.conv2d(x, s[f"{stem}.model.0.weight"], s[f"{stem}.model.0.bias"], padding=1)
        x = F.group_norm(x, groups, s[f"{stem}.model.1.weight"], s[f"{stem}.model.1.bias"], eps=1e-5)
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def linear(self, x, stem):
        return x @ self.state[f"{stem}.weight"].T + self.state[f"{stem}.bias"]

    def residual(self, x, stem, groups):
        first = self.conv_norm_gelu(x, f"{stem}.conv1", groups)
        return first + self.conv_norm_gelu(first, f"{stem}.conv2", groups)

    def down(self, x, stem):
        x = self.conv_norm_gelu(x, f"{stem}.model.0", 32)
        x = self.conv_norm_gelu(x, f"{stem}.model.1", 32)
        x = rearrange(x, "b c (h p1) (w p2) -> b (c p1 p2) h w", p1=2, p2=2)
        return self.conv_norm_gelu(x, f"{stem}.model.2.conv", 32)

    def embed(self, x, stem):
        x = F.gelu(self.linear(x, f"{stem}.model.0"))
        return self.linear(x, f"{stem}.model.2")[:, :, None, None]

    def attention(self, x, stem):
        s, (_, c, h, w) = self.state, x.shape
        tokens = rearrange(x, "b c h w -> b (h w) c")
        normed = F.layer_norm(tokens, (c,), s[f"{stem}.ln.weight"], s[f"{stem}.ln.bias"])
        q, k, v = (normed @ s[f"{stem}.mha.in_proj_weight"].T + s[f"{stem}.mha.in_proj_bias"]).chunk(3, -1)
        mixed = (q @ k.transpose(1, 2) / c**0.5).softmax(-1) @ v
        y = 0.5 * self.linear(mixed, f"{stem}.mha.out_proj") + tokens
        return rearrange(y, "b (h w) c -> b c h w", h=h, w=w)

    def time(self, t):
        half = self.state["t_emb1.model.0.weight"].shape[1] // 2
        columns = [math.exp(-k * math.log(10000) / (half - 1)) for k in range(half)]
        angles = [t / self.T * f for f in columns]
        return torch.stack([torch.sin(a) for a in angles] + [torch.cos(a) for a in angles], 1)

    def head(self, up2, down0):
        s = self.state
        x = F.conv2d(torch.cat([up2, down0], 1), s["out.0.weight"], s["out.0.bias"], padding=1)
        x = F.group_norm(x, 8, s["out.1.weight"], s["out.1.bias"]).relu()
        return F.conv2d(x, s["out.3.weight"], s["out.3.bias"], padding=1)

    def transposed_up(self, x, skip, stem):
        s = self.state
        x = F.conv_transpose2d(
            torch.cat([x, skip], 1), s[f"{stem}.model.0.weight"], s[f"{stem}.model.0.bias"], stride=2
        )
        for n in range(1, 5):
            x = self.conv_norm_gelu(x, f"{stem}.model.{n}", 32)
        return x

    def nearest_up(self, x, skip, stem):
        s = self.state
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = F.conv2d(torch.cat([x, skip], 1), s[f"{stem}.conv_in.weight"], s[f"{stem}.conv_in.bias"], padding=1)
        for n in range(4):
            x = self.conv_norm_gelu(x, f"{stem}.model.{n}", 32)
        return x

    def __call__(self, x, t, c, mask):
        down0 = self.residual(x, "down0", 8)
        down1 = self.down(down0, "down1")
        down2 = self.down(down1, "down2")
        course = "dense_emb.0.weight" in self.state
        if course:
            vector = F.gelu(down2.reshape(len(x), -1))
            for n in (0, 2, 4):
                vector = self.linear(vector, f"dense_emb.{n}").relu()
            up0 = self.conv_norm_gelu(vector.reshape(down2.shape), "up0.1", 32)
        else:
            if "mid_block.1.ln.weight" in self.state:
                middle = self.residual(down2, "mid_block.0", 32)
                middle = self.residual(self.attention(middle, "mid_block.1"), "mid_block.2", 32)
            else:
                middle = self.residual(down2, "mid_block", 32)
            up0 = self.conv_norm_gelu(middle, "up0.0", 32)
        time, c = self.time(t), c * mask
        y = self.embed(c, "c_embed1") * up0 + self.embed(time, "t_emb1")
        up1 = self.transposed_up(y, down2, "up1") if course else self.nearest_up(y, down1, "up1")
        y = self.embed(c, "c_embed2") * up1 + self.embed(time, "t_emb2")
        up2 = self.transposed_up(y, down1, "up2") if course else self.nearest_up(y, down0, "up2")
        return self.head(up2, down0)


def small(family, attention, down_chs=(32, 64, 96), T=300):
    """Three different widths, so a swapped skip cannot fit; random norms, so none is an identity."""
    torch.manual_seed(0)
    network = UNet(T, 2, 12, down_chs, t_embed_dim=6, c_embed_dim=5, family=family, self_attention=attention)
    rng = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng)
    return network.double().eval()


def inputs(n=4):
    rng = torch.Generator().manual_seed(2)
    return (
        torch.randn(n, 2, 12, 12, generator=rng, dtype=torch.float64),
        torch.randn(n, 5, generator=rng, dtype=torch.float64),
    )


# Equal widths too: there a swapped skip does fit, and only numbers tell.
@pytest.mark.parametrize("down_chs", [(32, 64, 96), (64, 64, 64)], ids=["different", "equal"])
@pytest.mark.parametrize(("family", "attention"), FAMILIES, ids=ids)
def test_equals_the_second_implementation(family, attention, down_chs):
    network = small(family, attention, down_chs)
    reference = Reference(network.state_dict(), 300)
    x_t, cond = inputs()
    with torch.no_grad():
        for index in ([0, 1, 150, 299], [299, 2, 1, 0]):
            t = torch.tensor(index, dtype=torch.float64)
            expected = reference(x_t, t, cond, 1)
            # entry k = index + 1 of the schedule; the one difference is that ours keeps frequencies in float32
            torch.testing.assert_close(network(x_t, (t + 1) / 300, cond), expected, rtol=1e-6, atol=1e-6)
            nothing = reference(x_t, t, cond, 0)
            torch.testing.assert_close(network(x_t, (t + 1) / 300, None), nothing, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(
                network(x_t, (t + 1) / 300, torch.zeros_like(cond)), nothing, rtol=1e-6, atol=1e-6
            )
    # The oracle would see an index that is off by one.
    with torch.no_grad():
        shifted = network(x_t, t / 300 + 2 / 300, cond)
    assert (shifted - expected).abs().max() > 1e-4


@pytest.mark.parametrize(("family", "attention"), FAMILIES, ids=ids)
def test_samples_of_a_batch_do_not_meet(family, attention):
    network = small(family, attention)
    x_t, cond = inputs()
    t = torch.tensor([1, 20, 200, 300], dtype=torch.float64) / 300
    with torch.no_grad():
        together = network(x_t, t, cond)
        alone = torch.cat([network(x_t[i : i + 1], t[i : i + 1], cond[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("family", "attention"), FAMILIES, ids=ids)
def test_the_bottleneck_sees_the_image_alone(family, attention):
    network = small(family, attention)
    seen = []
    network.down2.register_forward_hook(lambda module, args, output: seen.append(output))
    x_t, cond = inputs()
    with torch.no_grad():
        outputs = [
            network(x_t, torch.full((4,), t, dtype=torch.float64), c) for t in (1 / 300, 0.5, 1.0) for c in (cond, None)
        ]
    assert seen[0].shape == (4, 96, 3, 3)
    assert all(torch.equal(seen[0], other) for other in seen[1:])
    assert all(not torch.allclose(outputs[0], other) for other in outputs[1:])


def test_float32_images_with_float64_times():
    network = small("course", False).float()
    x_t, cond = (part.float() for part in inputs())
    with torch.no_grad():
        output = network(x_t, torch.full((4,), 0.5, dtype=torch.float64), cond.double())
    assert output.dtype == torch.float32
    assert output.shape == x_t.shape


def test_rearrange_pool_is_space_to_depth():
    pool = RearrangePool(32, 32)
    x = torch.randn(2, 32, 6, 10, generator=torch.Generator().manual_seed(0))
    expected = rearrange(x, "b c (h p1) (w p2) -> b (c p1 p2) h w", p1=2, p2=2)
    assert torch.equal(pool.rearrange(x), expected)
    assert torch.equal(pool(x), pool.conv(expected))


def test_sinusoidal_frequencies():
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    frequencies = torch.tensor([1.0, 0.0464159, 0.00215443, 0.0001], dtype=torch.float64)
    features = sinusoidal(t, 8)
    assert features.shape == (3, 8)
    torch.testing.assert_close(features[:, :4], (t[:, None] * frequencies).sin(), rtol=0, atol=1e-7)
    torch.testing.assert_close(features[:, 4:], (t[:, None] * frequencies).cos(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 30}, "img_size = 30 must divide by 4"),
        ({"img_size": 0}, "must divide by 4"),
        ({"down_chs": (64, 64)}, "three multiples of 32"),
        ({"down_chs": (64, 48, 128)}, "three multiples of 32"),
        ({"family": "other"}, "choose course or handson"),
        ({"self_attention": True}, "no attention"),
        ({"t_embed_dim": 7}, "even and at least 4"),
        ({"t_embed_dim": 2}, "even and at least 4"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(AntherError, match=message), torch.device("meta"):
        UNet(**{"T": 400, "img_ch": 3, "img_size": 32, **options})


def test_images_and_conditions_of_another_shape_are_refused():
    network = small("handson", False)
    x_t, cond = inputs()
    t = torch.full((4,), 0.5)
    with pytest.raises(AntherError, match="takes images of 2 x 12 x 12 and was given 3 x 12 x 12"):
        network(torch.cat([x_t, x_t[:, :1]], 1), t, cond)
    with pytest.raises(AntherError, match="was given 2 x 8 x 12"):
        network(x_t[:, :, :8], t, cond)
    with pytest.raises(AntherError, match=r"width 5 and was given 4: set network.c_embed_dim"):
        network(x_t, t, cond[:, :4])


@pytest.mark.parametrize(("h", "w"), [(3, 3), (1, 4), (2, 1)])
def test_a_doubled_map_need_not_be_made(h, w):
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, h, w, generator=rng, dtype=torch.float64)
    weight = torch.randn(4, 5, 3, 3, generator=rng, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    torch.testing.assert_close(conv_of_doubled(x, weight), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("family", "attention"), FAMILIES, ids=ids)
def test_several_conditions_share_the_features_of_an_image(family, attention):
    network = small(family, attention)
    x_t, cond = inputs()
    t = torch.tensor([1, 20, 200, 300], dtype=torch.float64) / 300
    conds = [cond, torch.zeros_like(cond), 2 * cond]
    with torch.no_grad():
        together = network.decode(network.encode(x_t), t.repeat(3), torch.cat(conds))
        alone = torch.cat([network(x_t, t, one) for one in conds])
        nothing = network.decode(network.encode(x_t), t.repeat(2), None)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(nothing, alone[4:8].repeat(2, 1, 1, 1), rtol=0, atol=1e-12)


def test_autocast_leaves_every_time_its_own():
    network = UNet(400, 3, 8, (32, 32, 32), c_embed_dim=4, family="handson")
    seen = []
    network.t_emb1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    t = torch.arange(1, 401, dtype=torch.float64) / 400
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network.decode(network.encode(torch.randn(1, 3, 8, 8)), t, None)
    assert seen[0].dtype == torch.float32
    assert len(seen[0].unique(dim=0)) == 400
