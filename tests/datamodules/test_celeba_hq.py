import zipfile
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from datamodules.celeba import MASKS
from diffusion.build import build
from diffusion.errors import AntherError

CONF = Path(__file__).parents[2] / "conf"
N = 20


pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.fixture
def faces(tmp_path):
    """Copies of 256 px beside originals of 1,024 px."""
    folder = tmp_path / "faces"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(N):
        side = (256, 1024)[k % 2]
        small = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
        small.resize((side, side)).save(folder / f"{k:05d}.png")
    return folder


def ready(path, **settings):
    words = [f"data.{key}={value}" for key, value in ({"path": path, "batch_size": 2} | settings).items()]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("analyze", ["data=celeba_hq", *words])
    module = build(OmegaConf.to_container(cfg.data, resolve=True))
    module.prepare_data()
    module.setup()
    return module


@pytest.mark.parametrize("size", [64, 256])
def test_faces_of_256_and_1024_pixels(faces, size):
    module = ready(faces, size=size)
    assert module.describe() == f"celeba_hq: 18 train, 2 val images, 3×{size}×{size}, 1 class (face)"
    assert module.table.names == tuple(f"{k:05d}.png" for k in range(N))
    for k in (0, 1):
        whole = Image.open(faces / f"{k:05d}.png")
        assert whole.size == ((256, 256), (1024, 1024))[k]
        expected = np.asarray(whole.resize((size, size), Image.Resampling.BICUBIC))
        assert np.array_equal(module.table.images[k].transpose(1, 2, 0), expected)
    assert sorted(np.concatenate(list(module.splits.values()))) == list(range(N))
    assert next(iter(module.train_dataloader()))["image"].shape == (2, 3, size, size)


def test_the_masks_of_celebamask_hq_are_no_faces(faces, tmp_path):
    with zipfile.ZipFile(tmp_path / "CelebAMask-HQ.zip", "w") as archive:
        for file in faces.iterdir():
            archive.write(file, f"CelebAMask-HQ/CelebA-HQ-img/{file.name}")
            archive.write(file, f"CelebAMask-HQ/{MASKS}/0/{file.stem}_skin.png")
        archive.writestr("CelebAMask-HQ/CelebA-HQ-to-CelebA-mapping.txt", "idx orig_idx orig_file")
    table = ready(tmp_path / "CelebAMask-HQ.zip", size=8).table
    assert table.names == tuple(f"CelebA-HQ-img/{k:05d}.png" for k in range(N))


def test_what_is_missing_is_named(tmp_path):
    said = (
        r"neither .*/celeba_hq nor celeba_hq\.zip beside it exists; download CelebAMask-HQ\.zip from https.* and put "
        r"it there as celeba_hq\.zip or name it by data\.path\.$"
    )
    with pytest.raises(AntherError, match=said):
        ready(tmp_path / "celeba_hq")
