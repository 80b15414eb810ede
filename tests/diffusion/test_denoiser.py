import pytest
import torch
from torch import nn

from diffusion.denoiser import Denoiser
from diffusion.errors import AntherError
from diffusion.schedules import Cosine, Linear, Straight, ZeroTerminalSNR
from diffusion.targets import TARGETS
from diffusion.weighting import MinSNR, unit


class Table(nn.Module):
    """Answers with what it is given, and keeps what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.calls = answer, []

    def forward(self, x_t, t, cond):
        self.calls.append((x_t, t, cond))
        return self.answer


def draw(n=6, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    x_0, eps, answer = (torch.randn(n, 3, 4, 4, generator=rng, dtype=torch.float64).to(dtype) for _ in range(3))
    t = torch.tensor([1, 2, 50, 200, 399, 400][:n], dtype=torch.float64) / 400
    return x_0, eps, answer, t


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "noise"}, "unknown target 'noise': choose one of eps, x0, v, flow"),
        ({"loss": "l2"}, "unknown loss 'l2': choose one of mse, l1, huber"),
        ({"schedule": ZeroTerminalSNR(Linear(400))}, "use target=v"),
        ({"schedule": Straight(400)}, "use target=v"),
        ({"network_T": 300}, "T = 300 steps and the schedule 400"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    network = nn.Identity()
    if "network_T" in options:
        network.T = options.pop("network_T")
    with pytest.raises(AntherError, match=message):
        Denoiser(network, **{"schedule": Linear(400), **options})


def test_what_works_is_not_refused():
    network = nn.Identity()
    network.T = 400
    Denoiser(network, Linear(400))
    Denoiser(nn.Identity(), Cosine(1000))
    for target in ("x0", "v", "flow"):
        Denoiser(nn.Identity(), ZeroTerminalSNR(Linear(400)), target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_perfect_network_gives_back_x_0_and_has_no_loss(target, dtype):
    x_0, eps, _, t = draw(dtype=dtype)
    alpha, sigma = (level.to(dtype).view(-1, 1, 1, 1) for level in Linear(400)(t))
    perfect = {"eps": eps, "x0": x_0, "v": alpha * eps - sigma * x_0, "flow": eps - x_0}[target]
    network = Table(perfect)
    denoiser = Denoiser(network, Linear(400), target)
    x_t = denoiser.diffuse(x_0, t, eps)
    torch.testing.assert_close(x_t, alpha * x_0 + sigma * eps, rtol=0, atol=0)
    guess = denoiser(x_t, t)
    assert guess.dtype == dtype
    torch.testing.assert_close(guess, x_0, rtol=0, atol=1e-13 if dtype == torch.float64 else 1e-5)
    assert denoiser.loss(x_0, t, eps).max() < 1e-10


@pytest.mark.parametrize("weighting", [unit, MinSNR(5)], ids=["unit", "min_snr"])
@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
@pytest.mark.parametrize("target", TARGETS)
def test_loss_by_hand(target, loss, weighting):
    x_0, eps, answer, t = draw()
    network, cond = Table(answer), torch.ones(6, 2)
    losses = Denoiser(network, Linear(400), target, loss, weighting).loss(x_0, t, eps, cond)
    assert losses.shape == (6,)
    assert losses.dtype == torch.float32
    for i in range(6):
        k = round(t[i].item() * 400)
        abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 400, dtype=torch.float64), 0)[k - 1].item()
        a, s = abar**0.5, (1 - abar) ** 0.5
        wanted = {"eps": eps[i], "x0": x_0[i], "v": a * eps[i] - s * x_0[i], "flow": eps[i] - x_0[i]}[target]
        e = (answer[i] - wanted).abs()
        distance = {"mse": e**2, "l1": e, "huber": torch.where(e < 1, e**2 / 2, e - 0.5)}[loss].mean().item()
        snr = abar / (1 - abar)
        error = {"eps": 1 / snr, "x0": 1, "v": 1 / (1 + snr), "flow": s**2 / (a + s) ** 2}[target]
        weight = 1 if weighting is unit else min(snr, 5) * error
        assert losses[i].item() == pytest.approx(weight * distance, rel=1e-5)
    (x_t, times, seen) = network.calls[0]
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in Linear(400)(t))
    torch.testing.assert_close(x_t, alpha * x_0 + sigma * eps, rtol=0, atol=0)
    assert torch.equal(times, t)
    assert seen is cond


def test_loss_is_float32_whatever_the_network_says():
    x_0, eps, answer, t = draw(dtype=torch.float32)
    plain = Denoiser(Table(answer), Linear(400)).loss(x_0, t, eps)
    half = Denoiser(Table(answer.bfloat16()), Linear(400)).loss(x_0, t, eps)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=1e-2, atol=1e-2)
    assert Denoiser(Table(answer.bfloat16()), Linear(400))(x_0, t).dtype == torch.float32


def test_loss_of_one_sample_does_not_depend_on_the_others():
    class Elementwise(nn.Module):
        def forward(self, x_t, t, cond):
            return torch.tanh(x_t) + t.view(-1, 1, 1, 1)

    x_0, eps, _, t = draw()
    denoiser = Denoiser(Elementwise(), Linear(400), "v", "huber", MinSNR())
    together = denoiser.loss(x_0, t, eps)
    alone = torch.cat([denoiser.loss(x_0[i : i + 1], t[i : i + 1], eps[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


def test_the_networks_gradient_flows():
    network = nn.Conv2d(3, 3, 1)
    network_call = network.forward
    network.forward = lambda x_t, t, cond: network_call(x_t)
    x_0, eps, _, t = draw(dtype=torch.float32)
    Denoiser(network, Linear(400)).loss(x_0, t, eps).mean().backward()
    assert network.weight.grad.abs().sum() > 0
