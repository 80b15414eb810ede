import json
import math

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import nn

from diffusion.denoiser import Denoiser, SharedEncoder
from diffusion.errors import AntherError
from diffusion.guidance import AutoGuidance, ClassifierFree, Guidance
from diffusion.networks.unet import UNet
from diffusion.rng import ImageRNG
from diffusion.samplers import DDIM
from diffusion.schedules import Linear, Straight, ZeroTerminalSNR
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


def level(t):
    """sigma / alpha of the linear schedule of 400 steps, written out."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)[round(t * T) - 1]
    return ((1 - abar) / abar).sqrt().item()


def test_guidance_acts_within_its_interval_and_costs_nothing_outside():
    network, null = Plain(), torch.zeros(1)
    denoiser = Denoiser(network, Linear(T))
    x_t, _, cond = inputs()
    interval = (level(0.25), level(0.5))
    guided = ClassifierFree(denoiser, null, 2.0, Guidance(interval))
    everywhere = ClassifierFree(denoiser, null, 2.0)
    # low < level <= high
    for t, inside in [(0.1, False), (0.25, False), (101 / 400, True), (0.4, True), (0.5, True), (201 / 400, False)]:
        times = torch.full((4,), t, dtype=torch.float64)
        expected = everywhere(x_t, times, cond) if inside else denoiser(x_t, times, cond)
        network.calls.clear()
        assert torch.equal(guided(x_t, times, cond), expected)
        assert network.calls == [8 if inside else 4]


def test_the_interval_counts_for_each_image():
    denoiser, (x_t, t, cond) = Denoiser(Plain(), Linear(T), "v"), inputs()
    guidance = Guidance((level(30 / 400), level(200 / 400)))
    together = ClassifierFree(denoiser, torch.zeros(1), torch.tensor([1.0, 2.0, 3.0, 4.0]), guidance)(x_t, t, cond)
    for i, w in enumerate([0.0, 0.0, 3.0, 0.0]):  # only the third lies inside
        alone = ClassifierFree(denoiser, torch.zeros(1), w)(x_t, t, cond)[i]
        torch.testing.assert_close(together[i], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", [Straight(T), ZeroTerminalSNR(Linear(T))], ids=["straight", "zero"])
def test_no_signal_is_an_infinite_level(schedule):
    network = Plain()
    x_t, _, cond = inputs()
    t = torch.ones(4, dtype=torch.float64)
    for interval, rows in [((0.1, math.inf), 8), ((0, math.inf), 8), ((0.1, 1e9), 4)]:
        network.calls.clear()
        ClassifierFree(Denoiser(network, schedule, "v"), torch.zeros(1), 2.0, Guidance(interval))(x_t, t, cond)
        assert network.calls == [rows]


def test_a_walk_saves_the_rows_outside():
    network = Plain()
    guidance = Guidance((level(0.31), level(0.72)))
    denoiser = ClassifierFree(Denoiser(network, Linear(T)), torch.zeros(1), 2.0, guidance)
    rng = ImageRNG([0, 1])
    DDIM(10)(denoiser, rng.randn((1, 4, 4)), rng, torch.ones(2, 1))
    assert network.calls == [2, 2, 2, 4, 4, 4, 4, 2, 2, 2]  # t = 1, 0.9, ..., 0.1


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("target", TARGETS)
def test_rescaling_is_the_rule_of_diffusers(target, phi):
    x_t, t, cond = inputs()
    denoiser, null, w = Denoiser(Plain(), Linear(T), target), torch.zeros(1), torch.tensor([2.0, 0.5, 7.0, -0.5])
    rescaled = ClassifierFree(denoiser, null, w, Guidance(rescale=phi))(x_t, t, cond)
    plain = ClassifierFree(denoiser, null, w)(x_t, t, cond)
    expected = rescale_noise_cfg(plain, denoiser(x_t, t, cond), phi)
    assert not torch.allclose(rescaled, plain, rtol=1e-3)
    torch.testing.assert_close(rescaled, expected, rtol=1e-10, atol=1e-12)


def test_an_image_of_one_colour_has_no_deviation_to_bring_back():
    class Untrained(nn.Module):
        """A last layer of zeros, as networks begin; without signal v = 0 means x_0 = 0."""

        def forward(self, x_t, t, cond):
            return torch.zeros_like(x_t)

    x_t, t, cond = inputs()
    denoiser = Denoiser(Untrained(), ZeroTerminalSNR(Linear(T)), "v")
    guided = ClassifierFree(denoiser, torch.zeros(1), 2.0, Guidance(rescale=0.7))(x_t, torch.ones_like(t), cond)
    assert torch.equal(guided, torch.zeros_like(x_t))


def test_without_signal_rescaling_v_is_rescaling_x_0():
    # There v = -x_0, and the rule on the network's output, as published, is the rule on x_0.
    network, schedule, null = Plain(), ZeroTerminalSNR(Linear(T)), torch.zeros(1, dtype=torch.float64)
    x_t, _, cond = inputs()
    t = torch.ones(4, dtype=torch.float64)
    v_c, v_u = network(x_t, t, cond), network(x_t, t, torch.zeros_like(cond))
    v = rescale_noise_cfg(3 * v_c - 2 * v_u, v_c, 0.7)
    x_0 = ClassifierFree(Denoiser(network, schedule, "v"), null, 2.0, Guidance(rescale=0.7))(x_t, t, cond)
    torch.testing.assert_close(x_0, -v, rtol=1e-10, atol=1e-12)


def test_rescaled_images_do_not_depend_on_the_others():
    x_t, t, cond = inputs()
    denoiser, guidance = Denoiser(Plain(), Linear(T)), Guidance(rescale=0.7)
    w = torch.tensor([-1.0, 0.0, 0.5, 4.0])
    together = ClassifierFree(denoiser, torch.zeros(1), w, guidance)(x_t, t, cond)
    for i in range(4):
        alone = ClassifierFree(denoiser, torch.zeros(1), w[i].item(), guidance)
        torch.testing.assert_close(alone(x_t, t, cond)[i], together[i], rtol=1e-12, atol=1e-12)


def test_defaults_are_the_plain_guidance_to_the_bit():
    x_t, t, cond = inputs()
    denoiser = Denoiser(Plain(), Linear(T), "v")
    plain = 3 * denoiser.branches(x_t, t, (cond, torch.zeros_like(cond)))[0]
    plain = plain - 2 * denoiser.branches(x_t, t, (cond, torch.zeros_like(cond)))[1]
    for guidance in (None, Guidance(), Guidance([0, math.inf])):
        assert torch.equal(ClassifierFree(denoiser, torch.zeros(1), 2.0, guidance)(x_t, t, cond), plain)


@pytest.mark.parametrize("w", [0.0, 0.5, 6.5, 14.0])
@pytest.mark.parametrize("target", TARGETS)
def test_a_negative_prompt_is_the_doubled_batch_of_stable_diffusion(target, w):
    x_t, t, cond = inputs()
    network, negative = Plain(), torch.tensor([-0.7], dtype=torch.float64)
    both = network(torch.cat([x_t] * 2), torch.cat([t] * 2), torch.cat([negative.expand_as(cond), cond]))
    away, towards = both.chunk(2)
    output = away + (1 + w) * (towards - away)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)[(t * T).round().long() - 1]
    a, s = abar.sqrt().view(-1, 1, 1, 1), (1 - abar).sqrt().view(-1, 1, 1, 1)
    expected = {
        "eps": (x_t - s * output) / a,
        "x0": output,
        "v": a * x_t - s * output,
        "flow": (x_t - s * output) / (a + s),
    }[target]
    network.calls.clear()
    guided = ClassifierFree(Denoiser(network, Linear(T), target), negative, w)(x_t, t, cond)
    torch.testing.assert_close(guided, expected, rtol=1e-9, atol=1e-11)
    assert network.calls == [8 if w else 4]


def test_autoguidance_leads_away_from_the_worse_model():
    class Worse(Plain):
        def forward(self, x_t, t, cond):
            return super().forward(0.7 * x_t, t, 0.5 * cond)

    x_t, t, cond = inputs()
    main, bad = Denoiser(Plain(), Linear(T), "v"), Denoiser(Worse(), Linear(T), "eps")
    x_main, x_bad = main(x_t, t, cond), bad(x_t, t, cond)
    bad.network.calls.clear()
    # D_1 + (s - 1) (D_1 - D_0) with the paper's s = 1 + w
    torch.testing.assert_close(
        AutoGuidance(main, bad, 1.5)(x_t, t, cond), x_main + 1.5 * (x_main - x_bad), rtol=1e-12, atol=1e-12
    )
    assert bad.network.calls == [4]
    assert torch.equal(AutoGuidance(main, bad, 0.0)(x_t, t, cond), x_main)
    outside = AutoGuidance(main, bad, 1.5, Guidance((1e6, 1e7)))
    assert torch.equal(outside(x_t, t, cond), x_main)
    assert bad.network.calls == [4]  # neither of the two asked the worse model
    rescaled = AutoGuidance(main, bad, 1.5, Guidance(rescale=0.6))(x_t, t, cond)
    expected = rescale_noise_cfg(x_main + 1.5 * (x_main - x_bad), x_main, 0.6)
    torch.testing.assert_close(rescaled, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "interval", [(1, 1), (3, 2), (-1, 2), (1,), (1, 2, 3), "12", ("a", "b"), (math.nan, 2), (0, math.nan)]
)
def test_what_is_no_interval_is_refused(interval):
    with pytest.raises(AntherError, match=r"guidance.interval = .*0 <= low < high"):
        Guidance(interval)


@pytest.mark.parametrize("phi", [-0.1, 1.1, math.nan])
def test_what_is_no_share_is_refused(phi):
    with pytest.raises(AntherError, match=r"guidance\.rescale"):
        Guidance(rescale=phi)


def test_the_record_is_plain_and_says_nothing_of_defaults():
    nothing = {"guidance_interval": None, "guidance_rescale": None, "guidance_negative": None}
    assert Guidance().record() == Guidance([0, math.inf], 0).record() == nothing
    assert json.loads(json.dumps(Guidance((1, 5), 0.7, negative="a rose").record())) == {
        "guidance_interval": [1.0, 5.0],
        "guidance_rescale": 0.7,
        "guidance_negative": "a rose",
    }
    assert Guidance().describe() == ""
    assert Guidance((0.3, 5), 0.7).describe() == " where 0.3 < sigma / alpha <= 5, rescaled by phi = 0.7"
    assert Guidance(negative="a rose").describe() == ", away from 'a rose'"
