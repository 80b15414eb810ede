"""An autoencoder goes through train.py, sample.py and evaluate.py like every other model."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skimage
import torch
from PIL import Image

import train
from diffusion import checkpoint, cli
from diffusion.checkpoint import load_model
from diffusion.evaluation.embeddings import open_rows
from diffusion.evaluation.inception import Extractor, Features
from diffusion.evaluation.scoreboard import collect
from diffusion.evaluation.subject import load_data
from diffusion.images import from_uint8, to_uint8
from tests.e2e.test_train import DRAWN, ROOT

Call = Callable[..., Path]
TINY = ["experiment=vae_flowers102", *DRAWN, "data.n_train=16", "data.size=16", "trainer.accelerator=cpu"]
QUICK = ["num_images=6", "batch_size=4", "inception=null", "nearest.space=pixels", "dataset=null"]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(ROOT / "train.py"), *TINY, "trainer.max_epochs=2", f"hydra.run.dir={folder}"])
        cli.run(train.main)
    return folder / "checkpoints" / "last.ckpt"


def test_a_run_leaves_reconstructions_and_draws(vae: Path) -> None:
    run = vae.parents[1]
    assert list((run / "samples").glob("step-*.png"))
    assert list((run / "reconstructions").glob("step-*.png"))
    assert json.loads((run / "result.json").read_text())["parameters"] == sum(
        p.numel() for p in load_model(vae).parameters()
    )


def test_sample_draws_one_image_per_seed(vae: Path, call: Call, refused: Callable[..., str]) -> None:
    folder = call("sample.py", f"ckpt={vae}", "num_images=3", "seed=7", "batch_size=2")
    drawn = to_uint8(load_model(vae).sample(None, [7, 8, 9])).permute(0, 2, 3, 1).numpy()
    for k in range(3):
        file = np.asarray(Image.open(folder / f"images/0000{k}.png"), dtype=int)
        assert np.abs(file - drawn[k]).max() <= 1
    assert json.loads((folder / "samples.json").read_text())["protocol"]["sampler"] is None
    assert "gif" in refused("sample.py", f"ckpt={vae}", "gif=true", folder=folder / "other")
    for word in ("sampler=ddim", "sampler.steps=5"):
        assert "leave sampler= out" in refused("sample.py", f"ckpt={vae}", word, folder=folder / "other")
    assert "leave them out" in refused("sample.py", f"ckpt={vae}", "prompts=[a red rose]", folder=folder / "other")
    image = f"image={folder / 'images/00000.png'}"
    assert "leave image= out" in refused("sample.py", f"ckpt={vae}", image, folder=folder / "other")


@pytest.mark.parametrize(("when", "layer", "width"), [("last", None, 256), ("clean", "fc_mu", 128)])
def test_evaluate_scores_it_like_any_model(vae: Path, call: Call, when: str, layer: str | None, width: int) -> None:
    chosen = [f"embedding.when={when}", f"embedding.layer={layer or 'null'}"]
    folder = call("evaluate.py", f"ckpt={vae}", *QUICK, *chosen)
    content = json.loads((folder / "metrics.json").read_text())
    assert (content["run"]["sampler"], content["run"]["steps"], content["run"]["T"]) == (None, 0, None)
    assert content["run"]["embedding"]["layer"] == (layer or "decoder_input")
    assert content["metrics"]["diversity_6"]["value"] > 0
    assert (folder / "report.html").exists()
    frame = pd.read_parquet(folder / "records.parquet")
    assert list(frame["seed"]) == list(range(6))
    rows, model = open_rows(folder), load_model(vae)
    assert rows.shape == (6, width)
    images = model.sample(None, range(6))
    with torch.no_grad():
        from diffusion.rng import ImageRNG

        network = model.trained
        wanted = (
            network.decoder_input(ImageRNG(range(6)).randn((128,))) if layer is None else network.encode(images).mean
        )
    assert np.allclose(rows, wanted.numpy(), atol=1e-4)


def test_reconstructions_are_scored_against_their_originals(vae: Path, call: Call) -> None:
    folder = call("evaluate.py", f"ckpt={vae}", *QUICK, "reconstruct=val", "num_images=4", "batch_size=3")
    model, data = load_model(vae), load_data(checkpoint.read(vae)["config"])
    originals = data.pixels("val")
    back = to_uint8(model.reconstruct(from_uint8(originals)))
    frame = pd.read_parquet(folder / "records.parquet")
    table = data.table
    assert list(frame["original"]) == [table.names[row] for row in data.splits["val"]]
    assert list(frame["label"]) == [table.class_names[table.labels[row]] for row in data.splits["val"]]
    assert frame["seed"].isna().all()
    for k in range(4):
        ours = np.asarray(Image.open(folder / frame["file"][k]))
        assert np.abs(ours.astype(int) - back[k].permute(1, 2, 0).numpy()).max() <= 1  # a batch of 3 rounds otherwise
        theirs = originals[k].permute(1, 2, 0).numpy()
        assert frame["psnr"][k] == pytest.approx(skimage.metrics.peak_signal_noise_ratio(theirs, ours), abs=1e-3)
        window = {"gaussian_weights": True, "use_sample_covariance": False, "channel_axis": 2}
        expected = skimage.metrics.structural_similarity(theirs, ours, data_range=255, **window)
        assert frame["ssim"][k] == pytest.approx(expected, abs=1e-9)
    content = json.loads((folder / "metrics.json").read_text())
    assert content["metrics"]["psnr_4"]["value"] == pytest.approx(frame["psnr"].mean())
    assert (content["run"]["reconstruct"], content["run"]["seed"]) == ("val", None)
    assert (folder / "plots" / "reconstructions.png").exists()
    assert "of " + frame["original"][0] in (folder / "report.html").read_text()
    rows = open_rows(folder)
    with torch.no_grad():
        wanted = model.trained.decoder_input(model.trained.encode(from_uint8(originals)).mean)
    assert np.allclose(rows, wanted.numpy(), atol=1e-4)


def test_a_part_of_a_split_is_spread_over_its_classes(vae: Path, call: Call) -> None:
    asked = ["reconstruct=train", "num_images=5", "embedding=null", "nearest=null"]
    folder = call("evaluate.py", f"ckpt={vae}", *QUICK, *asked)
    data = load_data(checkpoint.read(vae)["config"])
    rows = data.splits["train"][[0, 3, 6, 9, 12]]
    frame = pd.read_parquet(folder / "records.parquet")
    assert list(frame["original"]) == [data.table.names[row] for row in rows]
    back = to_uint8(load_model(vae).reconstruct(from_uint8(torch.from_numpy(data.table.images[rows]))))
    for k in range(5):
        ours = np.asarray(Image.open(folder / frame["file"][k])).astype(int)
        assert np.abs(ours - back[k].permute(1, 2, 0).numpy()).max() <= 1


def test_what_cannot_be_reconstructed_is_said_first(vae: Path, refused: Callable[..., str]) -> None:
    asked = ["evaluate.py", f"ckpt={vae}", *QUICK]
    assert "has 4 images to reconstruct, not 6" in refused(*asked, "reconstruct=val")
    assert "no 'valid'" in refused(*asked, "reconstruct=valid")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sampler=ddim", "takes no sampler"),
        ("guidance.weight=1", "no condition"),
        ("prompts=[a red rose]", "no condition"),
        ("embedding={layer: null, form: flat, when: trace, steps: [0]}", "no steps to trace"),
        ("embedding.layer=down2", "no layer 'down2'"),
    ],
)
def test_what_it_has_not_is_said_first(vae: Path, refused: Callable[..., str], override: str, says: str) -> None:
    assert says in refused("evaluate.py", f"ckpt={vae}", *QUICK, override)


def test_another_kind_of_model_does_not_go_on_from_it(vae: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    assert "experiment" not in checkpoint.read(vae)["config"]
    diffusion = ["experiment=flowers102_seed004", *DRAWN, "data.size=16", "network.dim=16", "trainer.accelerator=cpu"]
    assert "holds another model" in refused("train.py", *diffusion, f"ckpt={vae}", folder=tmp_path / "other")
    wider = [*TINY, "network.latent_dim=64", "trainer.max_epochs=3"]
    assert "latent_dim = 128 there and 64 here" in refused("train.py", *wider, f"ckpt={vae}", folder=tmp_path / "other")


class Corners(Extractor):
    """In the place of Inception: twelve numbers of an image."""

    dim = 12

    def __init__(self) -> None:
        self.has_logits, self.one_channel, self.weights_hash = False, "refuse", "c0" * 32
        self.protocol = {"extractor": "corners", "weights_sha256": self.weights_hash}

    def part_features(self, images: torch.Tensor, batch_size: int = 32, label: str | None = None) -> Features:
        return Features(images[:, :, :2, :2].flatten(1).numpy().astype(np.float32) / 255)


@pytest.mark.slow
def test_it_stands_on_one_scoreboard_with_a_diffusion_model(
    vae: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.evaluation.scoring.load_extractor", lambda *_: Corners())
    tiny = [*DRAWN, "data.n_train=16", "data.size=16", "network.dim=16", "trainer.accelerator=cpu"]
    run = call("train.py", "experiment=flowers102_seed004", *tiny, "trainer.max_steps=2", "T=4", folder=tmp_path / "x")
    runs = tmp_path / "runs"
    asked = ["num_images=6", "inception.few_images=allow", "nearest=null", "dataset=null", "embedding=null"]
    for name, ckpt in (("unet", run / "checkpoints" / "last.ckpt"), ("vae", vae)):
        call("evaluate.py", f"ckpt={ckpt}", *asked, folder=runs / name)
    # Neither other images nor other reals come into their group.
    call("evaluate.py", f"ckpt={vae}", *asked, "reconstruct=train", folder=runs / "back")
    call("evaluate.py", f"ckpt={vae}", *asked, "inception.split=train", folder=runs / "train")
    board = collect(runs)
    assert board.left_out == []
    groups = {frozenset(entry.run for entry in entries): setting for setting, entries in board.groups.items()}
    assert set(groups) == {frozenset({"unet", "vae"}), frozenset({"back"}), frozenset({"train"})}
    setting = groups[frozenset({"unet", "vae"})]
    assert (setting.n, setting.n_real, setting.image_shape, setting.split) == (6, 20, (3, 16, 16), "all")
    entries = board.groups[setting]
    assert {(entry.model, entry.drawn) for entry in entries} == {
        ("flowers102_seed004", "DDPM 4"),
        ("vae_flowers102", "one call"),
    }
    values = [entry.value("fid") for entry in entries]
    assert None not in values
    assert values == sorted(values)
