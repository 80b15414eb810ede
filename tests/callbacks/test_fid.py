from pathlib import Path

import pytest
import torch
import yaml

from callbacks.checkpoints import BestCheckpoint
from callbacks.ema import EMA
from callbacks.fid import GenerationFid
from diffusion.assets import AssetError, resolve
from diffusion.errors import AntherError
from diffusion.evaluation.distribution import fid
from diffusion.evaluation.inception import load_extractor
from diffusion.evaluation.reference import moments
from diffusion.images import to_uint8
from tests.callbacks.tiny_training import Corners, Dots, module, trainer

PROMPTS = ["a daisy", "two roses", "a tulip"]


@pytest.fixture
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion.evaluation.reference.cache_dir", lambda: tmp_path / "cache")


def trained(tmp_path, data, extractor, **options):
    """Logged at the best of two epochs, and by hand: images drawn by seed from the averaged weights saved there."""
    m = module()
    best = BestCheckpoint(dirpath=tmp_path, filename="best_fid-{val/fid_50:.2f}", monitor="val/fid_50", mode="min")
    metric = GenerationFid(num_images=50, prompts=PROMPTS, seed=5, batch_size=17, **options)
    trainer(tmp_path, EMA(), metric, best, max_epochs=2).fit(m, datamodule=data)
    saved = torch.load(best.best_model_path, weights_only=True)
    m.denoiser.network.load_state_dict(saved["ema"]["network"])
    drawn = m.sample([PROMPTS[k % 3] for k in range(50)], range(5, 55)).clamp(-1, 1)
    split = options.get("split", "train")
    reals = torch.cat([data.pixels(name) for name in (("train", "val") if split == "all" else (split,))])
    by_hand = fid(extractor.part_features(to_uint8(drawn)).pool, *moments(extractor.part_features(reals).pool[:]))
    return float(best.best_model_score), by_hand


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("split", ["all", "train"])
def test_it_is_the_distance_of_images_drawn_by_seed_with_the_averaged_weights(tmp_path, split, monkeypatch):
    monkeypatch.setattr("callbacks.fid.load_extractor", lambda *_: Corners())
    logged, by_hand = trained(tmp_path, Dots(n=78), Corners(), split=split, every_n_epochs=1)
    assert logged == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.usefixtures("_own_cache")
def test_no_test_image_chooses_a_checkpoint_by_itself(tmp_path, monkeypatch):
    split = yaml.safe_load((Path(__file__).parents[2] / "conf/callbacks/fid.yaml").read_text())["fid"]["split"]
    monkeypatch.setattr("callbacks.fid.load_extractor", lambda *_: Corners())
    for options in ({}, {"split": split}):
        logged, by_hand = trained(tmp_path, Dots(n=78), Corners(), every_n_epochs=1, **options)
        assert logged == pytest.approx(by_hand, rel=1e-5)
    assert split == "train"


@pytest.mark.slow
def test_with_the_real_inception(tmp_path, monkeypatch):
    try:
        resolve("fid_inception")
    except AssetError as error:
        pytest.skip(str(error))
    # The weights are known by now; only the statistics of these reals go elsewhere.
    monkeypatch.setattr("diffusion.evaluation.reference.cache_dir", lambda: tmp_path / "cache")
    logged, by_hand = trained(tmp_path, Dots(n=78), load_extractor(), every_n_epochs=2)
    assert logged == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.usefixtures("_own_cache")
def test_too_few_images_stop_the_run_before_it_begins(tmp_path):
    with pytest.raises(AntherError, match="40 generated and 52 real images are too few"):
        trainer(tmp_path, GenerationFid(num_images=40, prompts=PROMPTS)).fit(module(), datamodule=Dots(n=78))


def test_a_model_of_prompts_without_prompts_is_refused_before_it_begins(tmp_path):
    with pytest.raises(AntherError, match="draws from prompts"):
        trainer(tmp_path, GenerationFid()).fit(module(), datamodule=Dots(n=78))
