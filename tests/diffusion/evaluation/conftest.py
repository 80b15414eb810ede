"""The real Inception, and images that were scored with it once for all tests."""

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.drawn import draw
from diffusion.assets import AssetError, resolve
from diffusion.evaluation.inception import load_extractor, load_network
from diffusion.images import to_uint8


@pytest.fixture(scope="session")
def inception_script():
    """The TorchScript file of the package index: the genuine weights without `fc`."""
    try:
        return resolve("fid_inception")
    except AssetError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def full_weights(inception_script, tmp_path_factory):
    """A file in torch-fidelity's format: the genuine weights with a random last layer, so that there are logits."""
    state = dict(load_network(inception_script)[0].state_dict())
    draws = torch.Generator().manual_seed(0)
    state["fc.weight"] = torch.randn(1008, 2048, generator=draws) * 0.1
    state["fc.bias"] = torch.randn(1008, generator=draws) * 3  # Must not be seen: the score leaves it out.
    path = tmp_path_factory.mktemp("weights") / "full.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def extractor(full_weights):
    return load_extractor(full_weights)


@pytest.fixture(scope="session")
def write_folder():
    """(folder, images (N, C, H, W) in [-1, 1]) -> the folder, with PNG files as anybody would write them."""

    def write(folder, images):
        folder.mkdir()
        levels = np.clip(np.rint((images.double().numpy() + 1) * 127.5), 0, 255).astype(np.uint8)
        for k, image in enumerate(levels):
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{k:06d}.png")
        return folder

    return write


@pytest.fixture(scope="session")
def generated_images():
    """Drawn flowers, two of three with noise and between the levels of a file: (36, 3, 32, 32) in [-1, 1]."""
    drawn = np.stack([draw(0, k, 32)[0] for k in range(36)])
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(1))
    noise[::3] = 0
    return (torch.from_numpy(drawn) / 127.5 - 1 + 0.3 * noise).clamp(-1, 1)


@pytest.fixture(scope="session")
def generated_folder(generated_images, write_folder, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("generated") / "images", generated_images)


@pytest.fixture(scope="session")
def generated(generated_images, extractor):
    return extractor.features(to_uint8(generated_images))


@pytest.fixture(scope="session")
def real_pixels():
    """Drawn flowers of another stream, uint8 (40, 3, 32, 32)."""
    return torch.from_numpy(np.stack([draw(7, k, 32)[0] for k in range(40)]))
