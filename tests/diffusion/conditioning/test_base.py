import pytest
import torch
from torch import nn

from diffusion.conditioning.labels import Labels
from diffusion.rng import generator

CONDITIONER = Labels(num_classes=8)  # `drop` and `null` are those of every conditioner.


def test_null_is_zeros_of_the_width():
    assert torch.equal(CONDITIONER.null, torch.zeros(8))


def test_conditioners_are_no_modules():
    assert not isinstance(CONDITIONER, nn.Module)


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (1.0, 1.0), (0.1, 0.1), (0.7, 0.7)])
def test_rows_are_dropped_whole_and_independently(probability, share):
    cond = torch.rand(20000, 8) + 1
    dropped = CONDITIONER.drop(cond, probability, torch.rand(20000, generator=generator(3)))
    null = (dropped == 0).all(1)
    assert torch.equal(dropped[~null], cond[~null])
    assert ((dropped == 0).any(1) == null).all()
    # Three standard deviations of a binomial share; exact at 0 and 1.
    assert abs(null.float().mean().item() - share) <= 3 * (share * (1 - share) / 20000) ** 0.5
    # Neighbours are independent: joint share is the product.
    both = (null[:-1] & null[1:]).float().mean().item()
    assert abs(both - share**2) <= 4 * (share**2 * (1 - share**2) / 20000) ** 0.5 + 1e-9


def test_drop_keeps_its_input_and_dtype_and_follows_the_draws():
    cond = torch.rand(64, 8).bfloat16() + 1
    before = cond.clone()
    draws = torch.rand(64, generator=generator(1))
    first, again = (CONDITIONER.drop(cond, 0.5, draws) for _ in range(2))
    assert torch.equal(cond, before)
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, again)
    assert torch.equal((first == 0).all(1), draws < 0.5)
