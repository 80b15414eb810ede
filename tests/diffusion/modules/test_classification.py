from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from diffusion.errors import AntherError
from diffusion.modules.classification import Classification, focal_loss
from diffusion.networks.classifier import LeNet


def logits_and_labels():
    rng = torch.Generator().manual_seed(0)
    return 3 * torch.randn(20, 11, generator=rng), torch.randint(11, (20,), generator=rng)


def module(**settings):
    return Classification(LeNet(11), optimizer=lambda p: torch.optim.Adam(p, lr=1e-3), **settings)


def test_focal_loss_without_focus_is_the_cross_entropy():
    logits, labels = logits_and_labels()
    assert torch.allclose(focal_loss(logits, labels, 0), cross_entropy(logits, labels, reduction="none"))


def test_focal_loss_of_two_classes_is_torchvisions():
    from torchvision.ops import sigmoid_focal_loss

    rng = torch.Generator().manual_seed(1)
    logit, label = torch.randn(50, generator=rng), torch.randint(2, (50,), generator=rng)
    # softmax of (0, z) is the sigmoid of z
    two = torch.stack([torch.zeros(50), logit], 1)
    theirs = sigmoid_focal_loss(logit, label.float(), alpha=-1, gamma=2.5)
    assert torch.allclose(focal_loss(two, label, 2.5), theirs, atol=1e-6)


def test_the_loss_is_the_one_that_was_chosen():
    logits, labels = logits_and_labels()
    plain, focal = module().losses(logits, labels), module(loss="focal", gamma=1.5).losses(logits, labels)
    assert torch.equal(plain, cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(focal, focal_loss(logits, labels, 1.5))


@pytest.mark.parametrize("settings", [{"loss": "hinge"}, {"gamma": -1}])
def test_bad_settings(settings):
    with pytest.raises(AntherError, match=rf"module\.{next(iter(settings))}"):
        module(**settings)


@pytest.mark.parametrize(("shape", "classes"), [((3, 28, 28), 11), ((1, 28, 28), 10)])
def test_data_that_do_not_fit(shape, classes):
    ours = module()
    ours._trainer = SimpleNamespace(datamodule=SimpleNamespace(image_shape=shape, class_names=("x",) * classes))
    with pytest.raises(AntherError, match="choose data and network that fit"):
        ours.setup("fit")
