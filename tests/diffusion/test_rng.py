from itertools import permutations

import torch

from diffusion.rng import ImageRNG, generator


def first(*key, n=4):
    return tuple(torch.randn(n, generator=generator(*key)).tolist())


def test_a_key_is_a_stream():
    assert first(3, 1, 4) == first(3, 1, 4)


def test_order_and_every_part_of_a_key_matter():
    streams = {first(*key) for key in permutations((0, 1, 2))}
    streams |= {first(*key) for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (2**40, 1, 2))}
    assert len(streams) == 10


def test_length_of_a_key_matters():
    # numpy alone pads keys with zeros: image 1 would be drawn from the noise of validation image 0 with seed 0.
    keys = [(k, *(0,) * zeros) for k in (0, 1) for zeros in range(5)]
    assert len({first(*key) for key in keys}) == len(keys)


def test_neighbouring_keys_are_unrelated():
    noise = torch.stack([torch.randn(4000, generator=generator(0, 0, step)) for step in range(12)])
    correlation = torch.corrcoef(noise) - torch.eye(12)
    assert correlation.abs().max() < 5 / 4000**0.5
    starts = torch.tensor([first(k, n=1)[0] for k in range(4000)])
    assert abs(starts.mean()) < 4 / 4000**0.5
    assert abs(starts.std() - 1) < 4 / 8000**0.5


def test_global_state_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before, one = torch.get_rng_state(), first(5)
    ImageRNG([1, 2]).randn((3,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert first(5) == one


def test_each_image_has_its_own_stream():
    shape = (2, 3, 3)
    together = ImageRNG([7, 8, 7])
    draws = [together.randn(shape), together.randn(shape)]
    assert len(together) == 3
    assert draws[0].shape == (3, *shape)
    for k, seed in enumerate((7, 8, 7)):
        alone = ImageRNG([seed])
        for draw in draws:
            assert torch.equal(draw[k], alone.randn(shape)[0])
    assert torch.equal(draws[0][0], draws[0][2])
    assert not torch.equal(draws[0][0], draws[0][1])
    assert not torch.equal(draws[0][0], draws[1][0])


def test_type_and_plain_generator():
    for dtype in (torch.float32, torch.float64):
        noise = ImageRNG([4]).randn((5,), dtype=dtype)
        assert noise.dtype == dtype
        assert torch.equal(noise[0], torch.randn(5, generator=generator(4), dtype=dtype))
