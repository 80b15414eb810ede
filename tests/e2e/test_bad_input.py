"""Bad input to the commands: one sentence that says what, where and what to do; status 1; nothing half-written."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffusion.modules.diffusion import Diffusion

TINY = [
    "experiment=demo",
    "data.n_train=32",
    "data.n_val=8",
    "data.batch_size=8",
    "network.down_chs=[32,32,32]",
    "sampler.steps=2",
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
]
FLOWERS = ["experiment=flowers", "trainer.accelerator=cpu"]

Call = Callable[..., Path]
Refused = Callable[..., str]


def test_an_objective_that_is_not_logged(refused: Refused) -> None:
    sentence = refused("train.py", *TINY, "objective=val/beauty")
    assert "val/beauty" in sentence
    assert "val/loss" in sentence


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["trainer.limit_val_batches=0.01"], "limit_val_batches"),
        (
            [
                "+callbacks.early._target_=lightning.pytorch.callbacks.EarlyStopping",
                "+callbacks.early.monitor=val/typo",
                "trainer.check_val_every_n_epoch=1",
                "trainer.max_steps=4",
            ],
            "val/typo",
        ),
    ],
    ids=["a part of a batch", "a metric that nobody logs"],
)
def test_what_lightning_refuses_only_when_it_gets_there(refused: Refused, words: list[str], name: str) -> None:
    sentence = refused("train.py", *TINY, "callbacks=fit", *words)
    assert name in sentence
    assert "Lightning" in sentence


def test_an_empty_class_folder(refused: Refused, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flowers"
    shutil.copytree(photos, folder)
    shutil.rmtree(folder / "roses")
    (folder / "roses").mkdir()
    assert "roses" in refused("train.py", *FLOWERS, f"data.path={folder}")


def test_a_corrupt_image(refused: Refused, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flowers"
    shutil.copytree(photos, folder)
    (folder / "roses" / "roses_3.jpg").write_bytes(b"not a photograph")
    sentence = refused("train.py", *FLOWERS, f"data.path={folder}")
    assert "roses_3.jpg" in sentence
    assert "on_corrupt" in sentence


def test_missing_clip_weights_are_named_with_the_way_to_get_them(
    refused: Refused, photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    sentence = refused("train.py", *FLOWERS, f"data.path={photos}", "data.split={train: 0.5, val: 0.5}")
    assert "ViT-B-32" in sentence
    assert "conditioner.pretrained=" in sentence


@pytest.mark.parametrize("damage", ["truncated", "pickle", "foreign"])
def test_a_checkpoint_that_is_none(damage: str, refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {}} if damage == "foreign" else {"fn": os.system}, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    for script, more in (("train.py", TINY), ("sample.py", [])):
        assert "bad.ckpt" in refused(script, *more, f"ckpt={path}", folder=tmp_path / script)


def test_a_checkpoint_of_another_network(call: Call, refused: Refused, tmp_path: Path) -> None:
    folder = call("train.py", *TINY, "callbacks=fit", folder=tmp_path / "first")
    last = folder / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    sentence = refused("train.py", *TINY, "callbacks=fit", "network.down_chs=[32,32,64]", f"ckpt={last}")
    assert "another model" in sentence
    assert "down_chs" in sentence
    # The same folder, too: the run that lies there is not touched.
    sentence = refused("train.py", *TINY, "callbacks=fit", "schedule=cosine", "trainer.max_steps=3", folder=folder)
    assert "schedule" in sentence
    assert last.read_bytes() == before


def test_nan_stops_with_the_step_and_keeps_the_checkpoint(
    call: Call, refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = call("train.py", *TINY, "callbacks=fit", folder=tmp_path / "first")
    before = (folder / "checkpoints" / "last.ckpt").read_bytes()
    step = Diffusion.training_step

    def poisoned(self: Diffusion, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return step(self, batch, batch_idx) * (float("nan") if self.global_step == 3 else 1.0)

    monkeypatch.setattr(Diffusion, "training_step", poisoned)
    overrides = [*TINY, "callbacks=fit", "trainer.max_steps=9", "callbacks.last.every_n_steps=1000"]
    sentence = refused("train.py", *overrides, folder=folder)
    assert " at step 3 " in sentence
    assert "last.ckpt" in sentence
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before


def test_an_unwritable_folder(refused: Refused, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        # Root may write anywhere; a file in the way stops it as well.
        (tmp_path / "shut").write_text("")
    else:
        (tmp_path / "shut").mkdir(mode=0o500)
    assert "shut" in refused("train.py", *TINY, folder=tmp_path / "shut" / "run")


def test_no_space_for_a_checkpoint(tmp_path: Path) -> None:
    """A real limit on the size of a file, in a process of its own, met while last.ckpt is written."""
    root = Path(__file__).resolve().parents[2]
    folder = tmp_path / "run"
    overrides = [*TINY, "callbacks=fit", f"hydra.run.dir={folder}"]
    shell = ["bash", "-c", 'ulimit -f 2000; exec "$@"', "-", sys.executable]
    done = subprocess.run([*shell, "train.py", *overrides], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "error: cannot write" in done.stderr
    assert not list((folder / "checkpoints").glob("*"))
