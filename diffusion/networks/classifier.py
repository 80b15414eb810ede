"""The classifier of digits."""

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from diffusion.errors import AntherError

MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels in [0, 1]


class LeNet(nn.Module):
    """LeNet-5 with rectifiers, as seed 001 trained it: 44,511 parameters with 11 classes.

        conv 5x5, 6    relu  max-pool 2    28 → 12
        conv 5x5, 16   relu  max-pool 2    12 → 4
        conv 4x4, 120  relu                 4 → 1
        linear 84      relu  dropout ½
        linear classes

    The names of its parts are the seed's, so that its weights load.

    Args:
        classes: outputs; the eleventh is IDK, "I don't know".
        digits: outputs that are digits.

    Reference: LeCun et al., 1998, "Gradient-based learning applied to document recognition".
    """

    image_shape = (1, 28, 28)
    features_dim = 84

    def __init__(self, classes: int = 11, digits: int = 10) -> None:
        super().__init__()
        if not 2 <= digits <= classes <= digits + 1:
            raise AntherError(f"{classes} classes with {digits} digits: a classifier has its digits and at most IDK.")
        self.classes, self.digits = classes, digits
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.conv3 = nn.Conv2d(16, 120, 4)
        self.fc1 = nn.Linear(120, self.features_dim)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(self.features_dim, classes)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees: (B, 84), not negative.

        Args:
            images: (B, 1, 28, 28) in [-1, 1].
        """
        x = ((images + 1) / 2 - MEAN) / STD
        x = max_pool2d(relu(self.conv1(x)), 2)
        x = max_pool2d(relu(self.conv2(x)), 2)
        x = relu(self.conv3(x)).flatten(1)
        return relu(self.fc1(x))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 1, 28, 28) in [-1, 1]."""
        logits: Tensor = self.fc2(self.dropout(self.features(images)))
        return logits


@torch.no_grad()
def infer(network: LeNet, images: Tensor, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and features (N, 84) of images (N, 1, 28, 28) in [-1, 1], on the CPU, without dropout."""
    device, training = network.fc2.weight.device, network.training
    network.eval()
    logits, features = [], []
    for start in range(0, len(images), batch_size):
        rows = network.features(images[start : start + batch_size].to(device))
        features.append(rows.cpu())
        logits.append(network.fc2(rows).cpu())
    network.train(training)
    return torch.cat(logits), torch.cat(features)
