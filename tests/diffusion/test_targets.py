import pytest
import torch
from diffusers import DDPMScheduler

from diffusion.schedules import Cosine, Linear, ScaledLinear, Sigmoid, Straight, ZeroTerminalSNR
from diffusion.targets import TARGETS, from_x_0, to_x_0, x_0_per_output

SCHEDULES = {
    "linear": Linear(400),
    "scaled_linear": ScaledLinear(300),
    "cosine": Cosine(1000),
    "sigmoid": Sigmoid(100),
    "zero": ZeroTerminalSNR(Linear(400)),
    "straight": Straight(1000),
}


def draw(n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, 2, 3, 3, generator=rng, dtype=torch.float64) for _ in range(2))


def levels(schedule, t):
    return tuple(level.view(-1, 1, 1, 1) for level in schedule(t))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_round_trip(target, schedule):
    t = torch.linspace(1 / schedule.T, 1, 97, dtype=torch.float64)
    x_0, eps = draw(len(t))
    alpha, sigma = levels(schedule, t)
    if target == "eps":  # says nothing about x_0 without signal
        keep = alpha.flatten() > 0
        x_0, eps, alpha, sigma = (part[keep] for part in (x_0, eps, alpha, sigma))
    x_t = alpha * x_0 + sigma * eps
    back = to_x_0(target, from_x_0(target, x_0, eps, alpha, sigma), x_t, alpha, sigma)
    torch.testing.assert_close(back, x_0, rtol=0, atol=1e-11 if target == "eps" else 1e-13)


def test_each_target_by_its_definition():
    (x_0, eps), alpha, sigma = draw(4), torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    wanted = {"eps": eps, "x0": x_0, "v": 0.6 * eps - 0.8 * x_0, "flow": eps - x_0}
    assert set(wanted) == set(TARGETS)
    for target, value in wanted.items():
        torch.testing.assert_close(from_x_0(target, x_0, eps, alpha, sigma), value, rtol=0, atol=1e-15)


def test_v_is_that_of_diffusers():
    scheduler = DDPMScheduler(num_train_timesteps=400)
    schedule = Linear(400)
    index = torch.tensor([0, 1, 57, 200, 399])
    x_0, eps = (part.float() for part in draw(5))
    alpha, sigma = (level.float() for level in levels(schedule, (index + 1).double() / 400))
    expected = scheduler.get_velocity(x_0, eps, index)
    torch.testing.assert_close(from_x_0("v", x_0, eps, alpha, sigma), expected, rtol=0, atol=1e-5)
    x_t = scheduler.add_noise(x_0, eps, index)
    torch.testing.assert_close(alpha * x_0 + sigma * eps, x_t, rtol=0, atol=1e-5)


def test_v_and_flow_are_speeds():
    # v is d x_t / d angle on the circle alpha = cos, sigma = sin; flow is d x_t / d t on the straight path.
    x_0, eps = draw(3)
    for target, path in (("v", lambda t: (t.cos(), t.sin())), ("flow", Straight(10))):
        t = torch.tensor(0.3, dtype=torch.float64)
        _, speed = torch.func.jvp(lambda t: path(t)[0] * x_0 + path(t)[1] * eps, (t,), (torch.ones_like(t),))  # noqa: B023
        torch.testing.assert_close(from_x_0(target, x_0, eps, *path(t)), speed, rtol=0, atol=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_x_0_per_output_is_the_derivative(target, schedule):
    t = torch.linspace(1 / schedule.T, 0.99, 31, dtype=torch.float64)
    alpha, sigma = schedule(t)
    output = torch.randn(31, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    x_0 = to_x_0(target, output, torch.ones(31, dtype=torch.float64), alpha, sigma)
    (slope,) = torch.autograd.grad(x_0.sum(), output)
    torch.testing.assert_close(x_0_per_output(target, alpha, sigma), slope.abs(), rtol=1e-13, atol=0)
