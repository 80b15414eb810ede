import numpy as np
import pytest
import torch

from diffusion.errors import AntherError
from diffusion.schedules import Cosine, Linear, Straight, ZeroTerminalSNR
from diffusion.targets import from_x_0, to_x_0
from diffusion.weighting import P2, MinSNR, unit

T = 400


def levels(schedule):
    return schedule(torch.arange(1, T + 1, dtype=torch.float64) / T)


def published(snr, gamma, target):
    """The weights of Hang et al., 2023, section 3.4, on each prediction's own mean squared error."""
    capped = np.minimum(snr, gamma)
    return {"x0": capped, "eps": capped / snr, "v": capped / (snr + 1)}[target]


def test_unit_is_one():
    assert torch.equal(unit(*levels(Linear(T)), "eps"), torch.ones(T, dtype=torch.float64))


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule", [Linear(T), Cosine(T)], ids=["linear", "cosine"])
def test_min_snr_is_the_published_formula(schedule, target, gamma):
    alpha, sigma = levels(schedule)
    snr = alpha.numpy() ** 2 / sigma.numpy() ** 2
    weight = MinSNR(gamma)(alpha, sigma, target)
    assert weight.dtype == torch.float64
    np.testing.assert_allclose(weight.numpy(), published(snr, gamma, target), rtol=1e-12)
    assert snr.max() > gamma > snr.min()  # both sides of the cap were seen


@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("schedule", [Linear(T), Straight(T)], ids=["linear", "straight"])
def test_min_snr_is_one_loss_for_every_target(schedule, target):
    # Weight x (error in the target)^2 must equal min(SNR, gamma) x (error in x_0)^2, whatever the network predicts.
    alpha, sigma = (level[:-1] for level in levels(schedule))
    rng = torch.Generator().manual_seed(0)
    x_0, eps, error = (torch.randn(T - 1, generator=rng, dtype=torch.float64) for _ in range(3))
    wanted = from_x_0(target, x_0, eps, alpha, sigma)
    guess = to_x_0(target, wanted + error, alpha * x_0 + sigma * eps, alpha, sigma)
    expected = (alpha**2 / sigma**2).clamp(max=5) * (guess - x_0) ** 2
    torch.testing.assert_close(MinSNR(5)(alpha, sigma, target) * error**2, expected, rtol=1e-8, atol=1e-12)


def test_min_snr_is_finite_without_signal():
    alpha, sigma = levels(ZeroTerminalSNR(Linear(T)))
    for target in ("x0", "v", "flow"):
        weight = MinSNR(5)(alpha, sigma, target)
        assert weight.isfinite().all()
        assert weight[-1] == 0
    assert MinSNR(5)(alpha, sigma, "eps")[-1] == 1


@pytest.mark.parametrize(("gamma", "k"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 0.3)])
@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("schedule", [Linear(T), Cosine(T)], ids=["linear", "cosine"])
def test_p2_is_the_published_weight_of_the_error_in_eps_whatever_is_predicted(schedule, target, gamma, k):
    alpha, sigma = levels(schedule)
    rng = torch.Generator().manual_seed(0)
    x_0, eps, error = (torch.randn(T, generator=rng, dtype=torch.float64) for _ in range(3))
    x_t = alpha * x_0 + sigma * eps
    guess = to_x_0(target, from_x_0(target, x_0, eps, alpha, sigma) + error, x_t, alpha, sigma)
    in_eps = (x_t - alpha * guess) / sigma - eps
    expected = in_eps**2 / (k + alpha**2 / sigma**2) ** gamma
    torch.testing.assert_close(P2(gamma, k)(alpha, sigma, target) * error**2, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_p2_on_eps_is_the_published_formula_and_grows_with_the_noise(gamma):
    alpha, sigma = levels(Linear(T))
    weight = P2(gamma)(alpha, sigma, "eps").numpy()
    np.testing.assert_allclose(weight, (1 + alpha.numpy() ** 2 / sigma.numpy() ** 2) ** -gamma, rtol=1e-12)
    assert (np.diff(weight) > 0).all()
    assert 0 < weight[0] < weight[-1] < 1


def test_p2_in_closed_form_where_the_variance_is_kept():
    alpha, sigma = levels(ZeroTerminalSNR(Linear(T)))
    expected = {"eps": sigma**2, "x0": alpha**2, "v": (alpha * sigma) ** 2}
    for target, weight in expected.items():
        torch.testing.assert_close(P2()(alpha, sigma, target), weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("gamma", "k"), [(-1.0, 1.0), (1.0, 0.0)])
def test_p2_has_ranges(gamma, k):
    with pytest.raises(AntherError, match=r"weighting\.gamma.*weighting\.k"):
        P2(gamma, k)
