import math

import pytest
import torch
from diffusers import DDPMScheduler

from diffusion.errors import AntherError
from diffusion.schedules import Cosine, Linear, ScaledLinear, Sigmoid, Straight, TableSchedule, ZeroTerminalSNR

TABLES = {
    "linear": Linear,
    "scaled_linear": ScaledLinear,
    "cosine": Cosine,
    "sigmoid": Sigmoid,
    "zero_linear": lambda T: ZeroTerminalSNR(Linear(T)),
    "zero_cosine": lambda T: ZeroTerminalSNR(Cosine(T)),
    "zero_sigmoid": lambda T: ZeroTerminalSNR(Sigmoid(T)),
}
SCHEDULES = {**TABLES, "straight": Straight}
CASES = [
    pytest.param(make, T, id=f"{name}-{T}")
    for name, make in SCHEDULES.items()
    for T in (1, 2, 10, 300, 1000)
    if T > 1 or not name.startswith("zero")
]


def grid(T):
    return torch.arange(T + 1, dtype=torch.float64) / T


# diffusers computes its tables in float32; cumprod over 1000 entries keeps 1e-6 of a number that is at most 1.
@pytest.mark.parametrize("T", [300, 400, 1000])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(Linear, "linear"), (ScaledLinear, "scaled_linear"), (Cosine, "squaredcos_cap_v2"), (Sigmoid, "sigmoid")],
)
def test_tables_are_those_of_diffusers(ours, theirs, T):
    expected = DDPMScheduler(num_train_timesteps=T, beta_schedule=theirs).alphas_cumprod.double()
    alpha, sigma = ours(T)(grid(T)[1:])
    torch.testing.assert_close(alpha**2, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(sigma**2, 1 - expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("limits", [(1e-4, 0.02), (0.00085, 0.012)])
def test_limits_of_the_betas_are_those_of_diffusers(limits):
    for ours, theirs in ((Linear, "linear"), (ScaledLinear, "scaled_linear"), (Sigmoid, "sigmoid")):
        scheduler = DDPMScheduler(beta_start=limits[0], beta_end=limits[1], beta_schedule=theirs)
        torch.testing.assert_close(
            ours(1000, *limits).alpha_bar[1:], scheduler.alphas_cumprod.double(), rtol=0, atol=1e-6
        )


# In float32 diffusers leaves 1e-8 at the end and loses digits in the product: 1e-5.
@pytest.mark.parametrize("T", [300, 400, 1000])
@pytest.mark.parametrize(("ours", "theirs"), [(Linear, "linear"), (ScaledLinear, "scaled_linear")])
def test_zero_terminal_snr_is_that_of_diffusers(ours, theirs, T):
    scheduler = DDPMScheduler(num_train_timesteps=T, beta_schedule=theirs, rescale_betas_zero_snr=True)
    alpha, _ = ZeroTerminalSNR(ours(T))(grid(T)[1:])
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod.double(), rtol=0, atol=1e-5)
    assert alpha[-1] == 0
    torch.testing.assert_close(alpha[0], ours(T)(grid(T)[1])[0], rtol=1e-12, atol=0)


def test_zero_terminal_snr_keeps_betas_that_multiply_to_its_table():
    schedule = ZeroTerminalSNR(Linear(400))
    torch.testing.assert_close(torch.cumprod(1 - schedule.betas, 0), schedule.alpha_bar[1:], rtol=1e-9, atol=1e-15)


# The course's table, to the digits known of it: sqrt(abar_T) is the signal LEVEL alpha at t = 1.
@pytest.mark.parametrize(("T", "alpha"), [(400, 0.132), (300, 0.219), (200, 0.364), (100, 0.603), (1000, 0.0064)])
def test_signal_left_by_the_courses_table(T, alpha):
    assert Linear(T, 1e-4, 0.02).terminal_alpha == pytest.approx(alpha, abs=5e-5 if T == 1000 else 5e-4)


@pytest.mark.parametrize(("make", "T"), CASES)
def test_endpoints_and_fall(make, T):
    schedule = make(T)
    assert schedule.T == T
    alpha, sigma = schedule(grid(T))
    assert (alpha[0], sigma[0]) == (1, 0)
    snr = schedule.snr(grid(T))
    assert math.isinf(snr[0])
    assert (snr.diff()[1:] < 0).all()
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    assert schedule.terminal_alpha == alpha[-1].item()


@pytest.mark.parametrize(("make", "T"), [case for case in CASES if "straight" not in case.id])
def test_table_entries_are_exact_and_variance_is_kept(make, T):
    schedule = make(T)
    for t in (grid(T), grid(T).float()):
        alpha, sigma = schedule(t)
        torch.testing.assert_close(alpha, schedule.alpha_bar.sqrt(), rtol=0, atol=0)
        torch.testing.assert_close(sigma, (1 - schedule.alpha_bar).sqrt(), rtol=0, atol=0)
    alpha, sigma = schedule(torch.linspace(0, 1, 4321, dtype=torch.float64))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("make", "T"), [case for case in CASES if "straight" not in case.id])
def test_between_entries_the_table_is_followed_without_a_jump(make, T):
    schedule = make(T)
    t = torch.linspace(0, 1, 20 * T + 7, dtype=torch.float64)
    alpha_bar = schedule(t)[0] ** 2
    assert (alpha_bar.diff() <= 0).all()
    steepest = -schedule.alpha_bar.diff().min()
    # A step of t of 1/(20 T) moves alpha_bar by a twentieth of an entry's fall, plus the snap onto entries.
    assert -alpha_bar.diff().min() <= steepest / 20 * 1.01
    middle = schedule((grid(T)[1:] + grid(T)[:-1]) / 2)[0] ** 2
    torch.testing.assert_close(middle, (schedule.alpha_bar[1:] + schedule.alpha_bar[:-1]) / 2, rtol=0, atol=1e-15)


def test_straight_is_a_straight_line():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    alpha, sigma = Straight(10)(t)
    assert torch.equal(sigma, t)
    assert torch.equal(alpha, 1 - t)


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_type(make, dtype):
    t = torch.rand(3, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    for level in make(10)(t):
        assert level.shape == (3, 2)
        assert level.dtype == torch.float64
    assert all(level.shape == () for level in make(10)(torch.tensor(0.5)))


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("t", [-1e-6, 1.0001, float("nan")])
def test_times_outside_are_refused(make, t):
    with pytest.raises(ValueError, match=r"times lie in \[0, 1\]"):
        make(10)(torch.tensor([0.5, t]))


@pytest.mark.parametrize("betas", [[], [0.1, 0.0], [0.1, 1.5], [-0.1], [float("nan")]])
def test_tables_that_are_none_are_refused(betas):
    with pytest.raises(AntherError, match="beta outside"):
        TableSchedule(torch.tensor(betas, dtype=torch.float64))


def test_one_step_cannot_be_rescaled():
    with pytest.raises(AntherError, match="T of 2 or more"):
        ZeroTerminalSNR(Linear(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_device_is_kept(make):
    t = torch.rand(5, device="cuda")
    for here, there in zip(make(10)(t.cpu()), make(10)(t), strict=True):
        assert there.device == t.device
        torch.testing.assert_close(here, there.cpu(), rtol=0, atol=1e-15)
