import pytest
import torch
from torch import nn

from diffusion.denoiser import Denoiser, SharedEncoder
from diffusion.guidance import ClassifierFree
from diffusion.networks.unet import UNet
from diffusion.schedules import Linear
from diffusion.targets import TARGETS

T = 400


class Plain(nn.Module):
    """A network without `encode`: elementwise, nonlinear in image, time and condition."""

    T = T

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x_t, t, cond):
        self.calls.append(len(x_t))
        c = cond.view(len(cond), -1, 1, 1)
        return torch.tanh(x_t * (1 + c) + t.to(x_t).view(-1, 1, 1, 1)) - c**2


def unet(family="course", attention=False):
    torch.manual_seed(0)
    network = UNet(T, 2, 8, (32, 32, 64), c_embed_dim=5, family=family, self_attention=attention)
    return network.double().eval()


def inputs(n=4, channels=3, size=4, dim=1):
    rng = torch.Generator().manual_seed(0)
    x_t = torch.randn(n, channels, size, size, generator=rng, dtype=torch.float64)
    cond = torch.randn(n, dim, generator=rng, dtype=torch.float64)
    t = torch.tensor([1, 30, 200, 400], dtype=torch.float64)[:n] / T
    return x_t, t, cond


def plain_way(network, target, x_t, t, cond, null, w):
    """e = (1 + w) e_c - w e_u on a doubled batch, as the published code has it, then x_0 from e."""
    e_c, e_u = network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([cond, null])).chunk(2)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)[(t * T).round().long() - 1]
    a, s = abar.sqrt().view(-1, 1, 1, 1), (1 - abar).sqrt().view(-1, 1, 1, 1)
    to_eps = {
        "eps": lambda out: out,
        "x0": lambda out: (x_t - a * out) / s,
        "v": lambda out: a * out + s * x_t,
        "flow": lambda out: (x_t + a * out) / (a + s),
    }[target]
    e = (1 + w) * to_eps(e_c) - w * to_eps(e_u)
    return (x_t - s * e) / a


@pytest.mark.parametrize("w", [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 7.5])
@pytest.mark.parametrize("target", TARGETS)
def test_equals_the_plain_doubled_batch(target, w):
    x_t, t, cond = inputs()
    null = torch.tensor([0.3], dtype=torch.float64)
    guided = ClassifierFree(Denoiser(Plain(), Linear(T), target), null, w)(x_t, t, cond)
    expected = plain_way(Plain(), target, x_t, t, cond, null.expand_as(cond), w)
    # x0 travels through eps = (x_t - a x_0) / s and back, which costs digits near t = 1.
    torch.testing.assert_close(guided, expected, rtol=1e-9, atol=1e-11)


def test_the_two_ends_are_the_two_models():
    x_t, t, cond = inputs()
    null = torch.zeros(1)
    denoiser = Denoiser(Plain(), Linear(T))
    assert torch.equal(ClassifierFree(denoiser, null, 0.0)(x_t, t, cond), denoiser(x_t, t, cond))
    assert torch.equal(ClassifierFree(denoiser, null, -1.0)(x_t, t, cond), denoiser(x_t, t, torch.zeros_like(cond)))
    # and the doubled way agrees with them where it takes over
    for end in (0.0, -1.0):
        near = ClassifierFree(denoiser, null, torch.tensor([end, end, end, 1.0], dtype=torch.float64))(x_t, t, cond)
        exact = ClassifierFree(denoiser, null, end)(x_t, t, cond)
        torch.testing.assert_close(near[:3], exact[:3], rtol=0, atol=1e-12)


def test_linear_in_the_weight():
    x_t, t, cond = inputs()
    denoiser = Denoiser(Plain(), Linear(T), "v")

    def at(w):
        return ClassifierFree(denoiser, torch.zeros(1), w)(x_t, t, cond)

    torch.testing.assert_close(at(3.0), at(0.0) + 3 * (at(0.0) - at(-1.0)), rtol=0, atol=1e-12)
    torch.testing.assert_close(at(0.5), (at(0.0) + at(1.0)) / 2, rtol=0, atol=1e-12)


def test_one_weight_per_image():
    x_t, t, cond = inputs()
    denoiser, w = Denoiser(Plain(), Linear(T)), torch.tensor([-1.0, 0.0, 0.5, 4.0])
    together = ClassifierFree(denoiser, torch.zeros(1), w)(x_t, t, cond)
    for i in range(4):
        alone = ClassifierFree(denoiser, torch.zeros(1), w[i].item())(x_t, t, cond)[i]
        torch.testing.assert_close(together[i], alone, rtol=1e-12, atol=1e-12)


def test_a_condition_is_needed():
    x_t, t, _ = inputs()
    with pytest.raises(ValueError, match="needs a condition"):
        ClassifierFree(Denoiser(Plain(), Linear(T)), torch.zeros(1), 1.0)(x_t, t, None)


@pytest.mark.parametrize(("w", "sizes"), [(2.0, [8]), (0.0, [4]), (-1.0, [4])])
def test_one_call_of_the_network(w, sizes):
    network = Plain()
    assert not isinstance(network, SharedEncoder)
    ClassifierFree(Denoiser(network, Linear(T)), torch.zeros(1), w)(*inputs())
    assert network.calls == sizes


@pytest.mark.parametrize(("family", "attention"), [("course", False), ("handson", False), ("handson", True)])
def test_the_encoder_runs_once_and_nothing_else_changes(family, attention):
    network = unet(family, attention)
    assert isinstance(network, SharedEncoder)
    x_t, t, cond = inputs(channels=2, size=8, dim=5)
    seen = {name: [] for name in ("down0", "down2", "up0", "up2")}
    handles = [
        getattr(network, name).register_forward_hook(lambda m, i, out, name=name: seen[name].append(len(out)))
        for name in seen
    ]
    guided = ClassifierFree(Denoiser(network, Linear(T)), torch.zeros(5), 2.0)(x_t, t, cond)
    assert seen == {"down0": [4], "down2": [4], "up0": [4], "up2": [8]}
    for handle in handles:
        handle.remove()
    expected = plain_way(network, "eps", x_t, t, cond, torch.zeros_like(cond), 2.0)
    torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("network", [Plain(), unet()], ids=["plain", "unet"])
def test_branches_are_the_forward_of_each_condition(network):
    x_t, t, cond = inputs(channels=2, size=8, dim=5 if isinstance(network, UNet) else 1)
    denoiser = Denoiser(network, Linear(T), "v")
    conds = [cond, torch.zeros_like(cond), 2 * cond]
    answers = denoiser.branches(x_t, t, conds)
    assert len(answers) == 3
    for answer, one in zip(answers, conds, strict=True):
        torch.testing.assert_close(answer, denoiser(x_t, t, one), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(answers[0], answers[1])
