import pytest
import torch
from torch import nn

from diffusion.errors import AntherError
from diffusion.networks.classifier import LeNet, infer


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(n)) * 2 - 1


def test_it_has_the_parameters_and_keys_of_seed_001():
    network = LeNet()
    assert sum(p.numel() for p in network.parameters()) == 44_511
    names = {key.rpartition(".")[0] for key in network.state_dict()}
    assert names == {"conv1", "conv2", "conv3", "fc1", "fc2"}


def test_it_computes_what_seed_001_describes():
    network = LeNet().eval()
    theirs = nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 120, 4), nn.ReLU(), nn.Flatten(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 11)),
    )
    theirs.load_state_dict(
        dict(zip(theirs.state_dict(), network.state_dict().values(), strict=True)),
    )
    pixels = (images(3) + 1) / 2
    with torch.no_grad():
        # torchvision's ToTensor and Normalize((0.1307,), (0.3081,)).
        assert torch.allclose(network(images(3)), theirs((pixels - 0.1307) / 0.3081), atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_infer_is_without_dropout_in_any_batches_and_leaves_the_mode(training):
    network = LeNet(10).train(training)
    logits, features = infer(network, images(7), batch_size=3)
    assert network.training is training
    assert not logits.requires_grad
    network.eval()
    with torch.no_grad():
        assert torch.allclose(logits, network(images(7)), atol=1e-5)
        assert torch.allclose(network.fc2(features), logits, atol=1e-5)
    assert features.shape == (7, 84)


@pytest.mark.parametrize(("classes", "digits"), [(12, 10), (9, 10), (1, 1)])
def test_classes_that_make_no_sense(classes, digits):
    with pytest.raises(AntherError, match=f"{classes} classes with {digits} digits"):
        LeNet(classes, digits)
