"""What evaluate.py scores with, on real Inception features: each number belongs to its image and its reals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from datamodules.drawn import DrawnFlowers
from diffusion.assets import AssetError
from diffusion.conditioning.clip import Clip
from diffusion.conditioning.openclip import EMBEDDED
from diffusion.errors import AntherError
from diffusion.evaluation import scoring
from diffusion.evaluation.distribution import fid
from diffusion.evaluation.reals import read_reals
from diffusion.evaluation.reference import moments
from diffusion.evaluation.report import split_key
from diffusion.evaluation.scoring import Scorers

RUN = {"steps": 7}
EMBEDDED_CLIP = {"model": "anther-flowers-32", "pretrained": "embedded"}


@pytest.fixture(scope="module")
def data():
    module = DrawnFlowers(n_train=24, n_val=20, size=32, batch_size=8, seed=0)
    module.setup()
    return module


@pytest.fixture(scope="module")
def images(real_pixels):
    """None of the data's own, which are the first stream of drawings."""
    return real_pixels[:36]


def config(full_weights, **changes):
    inception = {"weights": str(full_weights), "split": "all", "few_images": "allow", "one_channel": "refuse"}
    settings = {
        "clip": None,
        "classifier": None,
        "num_images": 36,
        "inception": {**inception, "missing": "refuse"},
        "nearest": {"space": "inception", "split": "train"},
    }
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(settings[key], dict) and value else value
    return settings


def subject(conditioner=None):
    return SimpleNamespace(model=SimpleNamespace(conditioner=conditioner), other_splits=lambda datamodule: [])


def scored(scorers, images, folder, prompts=None):
    return scorers.score(images, prompts, [None] * len(images), RUN, folder)


def test_every_number_is_that_of_its_image_and_its_reals(data, images, extractor, full_weights, tmp_path):
    scores = scored(Scorers(config(full_weights), subject(), data, "cpu"), images, tmp_path)
    ours = extractor.features(images)
    train, val = (extractor.features(data.pixels(name)) for name in ("train", "val"))
    reals = np.concatenate([train.pool, val.pool]).astype(float)

    assert scores.results["fid_36"].value == pytest.approx(fid(ours.pool, *moments(reals)), rel=1e-4)
    assert scores.results["fid_36"].protocol["N_real"] == 44

    between = cdist(ours.pool.astype(float), train.pool.astype(float))
    assert scores.columns["nearest_distance"] == pytest.approx(between.min(1).tolist(), rel=1e-5)
    names = [data.table.names[row] for row in data.splits["train"]]
    assert scores.columns["nearest_real"] == [names[k] for k in between.argmin(1)]

    to_reals, among = cdist(ours.pool.astype(float), reals), np.sort(cdist(reals, reals), 1)[:, 3]
    inner = among <= np.median(among)
    realism = (among[inner] / to_reals[:, inner]).max(1)
    assert scores.columns["realism"] == pytest.approx(realism.tolist(), rel=1e-4)

    chance = torch.from_numpy(ours.logits).double().softmax(1)
    assert scores.columns["inception_entropy"] == pytest.approx((-chance * chance.log()).sum(1).tolist(), rel=1e-4)
    assert RUN.items() <= scores.results["kid_36"].protocol.items()


def test_every_protocol_has_all_that_its_number_depends_on(data, images, extractor, full_weights, tmp_path):
    model = subject(Clip("anther-flowers-32", "embedded", "text"))
    chosen = config(full_weights, clip=EMBEDDED_CLIP, inception={"split": "val"})
    made_by = {"seed": 5, "guidance_weight": 2.0, "sampler": {"_target_": "diffusion.samplers.DDIM"}, "steps": 7}
    scorers = Scorers(chosen, model, data, "cpu")
    results = scorers.score(images, ["a red rose"] * 36, [None] * 36, made_by, tmp_path).results
    by_nobody = {"diversity", "diversity_pairs"}  # of the images alone
    by_clip = {f"clip_score{form}" for form in ("", "_100", "_std")}
    by_inception = {"fid", "kid", "kid_std", "is", "is_std", "precision", "recall", "realism", "inception_entropy"}
    found = {split_key(key).name: result.protocol for key, result in results.items()}
    assert found.keys() == by_nobody | by_clip | by_inception | {"nearest_distance"}
    for name, protocol in found.items():
        assert {"N": 36, **made_by}.items() <= protocol.items(), name
        if name in by_clip:
            assert {"scorer", "weights_sha256", "preprocess"} <= protocol.keys(), name
        elif name not in by_nobody:
            assert extractor.protocol.items() <= protocol.items(), name
            reals = read_reals(data, "train" if name == "nearest_distance" else "val")
            of_reals = {"reals": reals.identity, "split": reals.split, "N_real": len(reals.rows)}
            assert {"data_digest": data.table.digest, **of_reals}.items() <= protocol.items(), name


@pytest.mark.slow
def test_images_in_another_order_have_the_same_scores_in_that_order(data, images, full_weights, tmp_path):
    scorers = Scorers(config(full_weights), subject(), data, "cpu")
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    straight, turned = scored(scorers, images, tmp_path), scored(scorers, images[order], tmp_path)
    for name in ("nearest_distance", "realism", "inception_entropy"):
        assert np.allclose(np.array(straight.columns[name])[order], turned.columns[name], rtol=1e-4)
        assert len(set(straight.columns[name])) > 30
    assert straight.results["fid_36"].value == pytest.approx(turned.results["fid_36"].value, rel=1e-3)


def test_all_statistics_are_there_before_an_image_is_drawn(data, images, full_weights, tmp_path, monkeypatch):
    # The training images are not among those of FID, so that they are looked at by themselves.
    scorers = Scorers(config(full_weights, inception={"split": "val"}), subject(), data, "cpu")
    monkeypatch.setattr(scoring, "reference", lambda *_: pytest.fail("computed after drawing"))
    scores = scored(scorers, images, tmp_path)
    assert scores.results["fid_36"].protocol["N_real"] == 20
    assert set(scores.columns["nearest_real"]) <= {data.table.names[row] for row in data.splits["train"]}


def test_the_nearest_by_pixels_is_the_nearest(data, images, full_weights, tmp_path):
    chosen = config(full_weights, inception=None, nearest={"space": "pixels"})
    columns = scored(Scorers(chosen, subject(), data, "cpu"), images, tmp_path).columns
    between = cdist(images.flatten(1).double() / 255, data.pixels("train").flatten(1).double() / 255)
    assert columns["nearest_distance"] == pytest.approx(between.min(1).tolist(), rel=1e-5)
    assert columns["nearest_row"] == data.splits["train"][between.argmin(1)].tolist()


def test_the_identity_knows_which_reals(data, full_weights):
    whole = Scorers(config(full_weights), subject(), data, "cpu").identity
    other = DrawnFlowers(n_train=24, n_val=20, size=32, batch_size=8, seed=0)
    other.setup()
    other._splits = {"train": other.splits["val"], "val": other.splits["train"]}
    swapped = Scorers(config(full_weights), subject(), other, "cpu").identity
    assert whole["inception"]["reals"] == swapped["inception"]["reals"]  # all of both, in another order
    assert whole["nearest"]["reals"] != swapped["nearest"]["reals"]
    assert read_reals(data, "train").identity == read_reals(other, "val").identity


@pytest.mark.parametrize("file", [False, True])
def test_the_note_knows_the_conditioning_clip_by_its_weights(data, images, full_weights, tmp_path, file):
    name = str(EMBEDDED["anther-flowers-32"]) if file else "embedded"
    model = subject(Clip("anther-flowers-32", name, "text"))
    chosen = config(full_weights, clip=EMBEDDED_CLIP, inception=None, nearest=None)
    scores = scored(Scorers(chosen, model, data, "cpu"), images, tmp_path, ["a red rose"] * 36)
    assert "flatters" in scores.results["clip_score_36/anther-flowers-32/embedded"].note


@pytest.mark.parametrize("missing", [False, True])
def test_another_clip_does_not_flatter(data, images, full_weights, tmp_path, monkeypatch, missing):
    def weights_hash(_):
        if missing:
            raise AntherError("nowhere")
        return "of others"

    monkeypatch.setattr(Clip, "weights_hash", property(weights_hash))
    chosen = config(full_weights, clip=EMBEDDED_CLIP, inception=None, nearest=None)
    scorers = Scorers(chosen, subject(Clip("ViT-B-32", "openai", "text")), data, "cpu")
    scores = scored(scorers, images, tmp_path, ["a red rose"] * 36)
    assert scores.results["clip_score_36/anther-flowers-32/embedded"].note is None


def test_without_the_last_layer_the_entropy_is_null_with_the_reason(data, images, inception_script, tmp_path):
    chosen = config(inception_script, num_images=3, inception={"split": "val"}, nearest=None)
    scores = scored(Scorers(chosen, subject(), data, "cpu"), images[:3], tmp_path)
    assert "inception_entropy" not in scores.columns
    assert scores.results["inception_entropy_3"].value is None
    assert scores.results["inception_entropy_3"].note == scores.results["is_3"].note.partition("; ")[0]


def test_without_inception_weights_the_reason_is_in_files_and_where_they_were_looked_for_is_printed(
    data, images, tmp_path, monkeypatch
):
    def nowhere(*_):
        raise AssetError(f"not at {tmp_path}.")

    monkeypatch.setattr(scoring, "load_extractor", nowhere)
    chosen = config("none", inception={"missing": "leave_out"}, nearest={"space": "pixels"})
    scorers = Scorers(chosen, subject(), data, "cpu")
    assert str(tmp_path) in scorers.describe()["left out"]
    results = scored(scorers, images, tmp_path).results
    for name in ("fid", "kid", "kid_std", "is", "is_std", "precision", "recall", "realism", "inception_entropy"):
        assert results[f"{name}_36"].value is None
        assert results[f"{name}_36"].note == scorers.identity["left_out"] == scoring.LEFT_OUT
    with pytest.raises(AntherError, match=rf"nearest\.space=pixels or nearest=null.*{tmp_path}"):
        Scorers(config("none", inception={"missing": "leave_out"}), subject(), data, "cpu")
    with pytest.raises(AssetError, match=str(tmp_path)):
        Scorers(config("none"), subject(), data, "cpu")


def test_nearest_by_inception_without_inception_is_refused(data, full_weights):
    with pytest.raises(AntherError, match=r"nearest\.space=pixels"):
        Scorers(config(full_weights, inception=None), subject(), data, "cpu")
