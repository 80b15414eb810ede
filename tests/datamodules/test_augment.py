import math

import numpy as np
import pytest
import torch

from datamodules.augment import Affine, FlipCrop, NonLeaking, warp
from diffusion.images import from_uint8


def pixels(n, side=8, width=None):
    draw = np.random.default_rng(0).integers(0, 256, (n, 3, side, width or side), np.uint8)
    return torch.from_numpy(draw)


def uniforms(n, augment, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((n, augment.draws)))


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
def test_flip_happens_as_often_as_asked(flip):
    augment = FlipCrop(flip)
    images = pixels(2000, 4)
    result, labels = augment(images, uniforms(2000, augment), 4)
    assert labels is None
    plain = (result == from_uint8(images)).all(dim=(1, 2, 3))
    mirrored = (result == from_uint8(images.flip(-1))).all(dim=(1, 2, 3))
    assert (plain ^ mirrored).all()
    assert mirrored.float().mean() == pytest.approx(flip, abs=0.04 if flip == 0.5 else 0)


def test_crops_are_windows_of_every_place():
    augment = FlipCrop(0.0)
    coordinates = torch.stack(torch.meshgrid(torch.arange(10), torch.arange(12), indexing="ij")).to(torch.uint8)
    image = torch.cat([coordinates, coordinates[:1]])[None].expand(3000, -1, -1, -1)
    result, _ = augment(image, uniforms(3000, augment), 8)
    back = ((result + 1) * 127.5).round()
    top, left = back[:, 0, 0, 0], back[:, 1, 0, 0]
    assert torch.equal(back[:, 0], top[:, None, None] + torch.arange(8)[:, None].expand(8, 8))
    assert torch.equal(back[:, 1], left[:, None, None] + torch.arange(8).expand(8, 8))
    counts = torch.bincount((top * 5 + left).long())
    assert len(counts) == 15
    assert counts.min() > 140


@pytest.mark.parametrize(
    "augment",
    [FlipCrop(), NonLeaking(p=0.5, upside_down=True), Affine()],
    ids=["flip", "nonleaking", "affine"],
)
def test_an_image_depends_on_its_own_draws_alone(augment):
    images, draws = pixels(16, 10), uniforms(16, augment)
    whole, labels = augment(images, draws, 8)
    assert whole.shape == (16, 3, 8, 8)
    assert whole.dtype == torch.float32
    assert whole.abs().max() <= 1
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    parts, part_labels = augment(images[order], draws[order], 8)
    assert torch.allclose(parts, whole[order], atol=1e-6)
    for k in (0, 7):
        alone, label = augment(images[k : k + 1], draws[k : k + 1], 8)
        assert torch.allclose(alone[0], whole[k], atol=1e-6)
        assert labels is None or torch.equal(label[0], labels[k])
    assert labels is None or torch.equal(part_labels, labels[order])


def test_inputs_are_left_alone():
    for augment in (FlipCrop(), NonLeaking(p=1.0), Affine()):
        images = pixels(4)
        before = images.clone()
        augment(images, uniforms(4, augment), 8)
        assert torch.equal(images, before)


def test_zero_labels_mean_untouched_images():
    augment = NonLeaking(p=0.0)
    images = pixels(400)
    result, labels = augment(images, uniforms(400, augment), 8)
    assert labels.shape == (400, augment.width)
    assert labels.dtype == torch.float32
    untouched = (labels == 0).all(1)
    assert torch.equal(result[untouched], from_uint8(images[untouched]))
    assert torch.equal(labels[:, 0].unique(), torch.tensor([0.0, 1.0]))
    assert (labels[:, 1:] == 0).all()
    assert torch.allclose(result[~untouched], from_uint8(images[~untouched]).flip(-1), atol=1e-5)


def test_labels_have_the_distribution_of_the_paper():
    augment = NonLeaking(p=0.12, upside_down=True)
    labels = augment.labels(uniforms(200_000, augment)).double()
    assert labels[:, 0].mean() == pytest.approx(0.5, abs=0.01)
    assert labels[:, 1].mean() == pytest.approx(0.06, abs=0.003)
    turned = (labels[:, 3:5] != 0).any(1)
    for applied in (labels[:, 2] != 0, turned, labels[:, 5] != 0):
        assert applied.double().mean() == pytest.approx(0.12, abs=0.003)
    for column in (2, 5, 6):
        values = labels[:, column][labels[:, column] != 0]
        assert values.mean() == pytest.approx(0, abs=0.03)
        assert values.std() == pytest.approx(1, abs=0.02)
    angle = torch.atan2(labels[turned, 4], labels[turned, 3] + 1)
    assert angle.abs().max() <= math.pi + 1e-6
    assert angle.std() == pytest.approx(math.pi / math.sqrt(3), abs=0.03)
    assert torch.allclose((labels[:, 3] + 1) ** 2 + labels[:, 4] ** 2, torch.ones(1).double(), atol=1e-5)
    # Independent of each other.
    assert ((labels[:, 2] != 0) & turned).double().mean() == pytest.approx(0.0144, abs=0.001)
    assert (NonLeaking(p=1.0).labels(uniforms(100, augment))[:, 1] == 0).all()


LABELS = {
    "mirror": ([1, 0, 0, 0, 0, 0, 0], lambda x: x.flip(-1)),
    "upside down": ([0, 1, 0, 0, 0, 0, 0], lambda x: x.flip(-2)),
    "quarter turn to the left": ([0, 0, 0, -1, 1, 0, 0], lambda x: torch.rot90(x, 1, (-2, -1))),
    "mirror, then turn": ([1, 0, 0, -1, 1, 0, 0], lambda x: torch.rot90(x.flip(-1), 1, (-2, -1))),
    "half turn": ([0, 0, 0, -2, 0, 0, 0], lambda x: torch.rot90(x, 2, (-2, -1))),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_say_what_was_done(name):
    label, expected = LABELS[name]
    images = from_uint8(pixels(1))
    result = warp(images, torch.tensor([label], dtype=torch.float32), 0.2, 0.125)
    assert torch.allclose(result, expected(images), atol=1e-4)


def test_shift_is_right_and_down_also_when_turned():
    image = from_uint8(pixels(1, 16))
    for label in ([0, 0, 0, 0, 0, 1, -2], [0, 0, 0, -1, 1, 1, -2], [1, 0, 0, -1, 1, 1, -2]):
        unmoved = warp(image, torch.tensor([[*label[:5], 0.0, 0.0]]), 0.2, 0.125)
        moved = warp(image, torch.tensor([label], dtype=torch.float32), 0.2, 0.125)
        # One eighth of 16 is 2 pixels to the right, two eighths are 4 up.
        assert torch.allclose(moved[..., :12, 2:], unmoved[..., 4:, :14], atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "uniform", "label"),
    [
        ({"degrees": 90, "scale": 0, "shift": 0}, [1, 0, 0, 0], [0, 0, 0, -1, 1, 0, 0]),
        ({"degrees": 90, "scale": 0, "shift": 0}, [0, 1, 1, 1], [0, 0, 0, -1, -1, 0, 0]),
        ({"degrees": 0, "scale": 0.5, "shift": 0}, [1, 0, 0, 0], [0, 0, -5, 0, 0, 0, 0]),
        ({"degrees": 0, "scale": 0, "shift": 0.25}, [0.5, 0.5, 1, 0], [0, 0, 0, 0, 0, 2, -2]),
    ],
    ids=["left", "right", "half the size", "right and up"],
)
def test_affine_moves_as_far_as_it_says(settings, uniform, label):
    images = pixels(1, 16)
    # Uniforms 0 and 1 are the ends of every range; scale 0.5 at uniform 0 halves.
    uniform = [1 - uniform[0] if settings["scale"] else uniform[0], *uniform[1:]]
    moved, labels = Affine(**settings)(images, torch.tensor([uniform], dtype=torch.float64), 16)
    expected = warp(from_uint8(images), torch.tensor([label], dtype=torch.float32), 0.2, 0.125)
    assert labels is None
    assert torch.allclose(moved, expected, atol=1e-4)


def test_scale_enlarges():
    x = torch.linspace(-1, 1, 33)
    ramp = x.expand(1, 1, 33, 33).contiguous()
    doubled = warp(ramp, torch.tensor([[0, 0, 5.0, 0, 0, 0, 0]]), 0.2, 0.125)
    assert torch.allclose(doubled[0, 0, 16], x / 2, atol=1e-3)
