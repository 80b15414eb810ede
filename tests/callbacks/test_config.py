from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from PIL import Image

from callbacks.ema import EMA
from tests.callbacks.tiny_training import Dots, module, trainer

CONF = Path(__file__).parents[2] / "conf"


def built(group, name, output, *overrides):
    """What a group's file instantiates to in a run with this output folder."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(
            f"{group}/{name}", overrides=[f"hydra.runtime.output_dir={output}", *overrides], return_hydra_config=True
        )
    HydraConfig.instance().set_config(config)
    nodes = (config.get(group) or {}).items()
    return {name: instantiate(node) for name, node in nodes if "_target_" in node}


@pytest.fixture(autouse=True)
def _no_hydra_left():
    yield
    HydraConfig.instance().cfg = None


@pytest.mark.parametrize("order", [1, -1])
def test_the_text_callbacks_train_draw_score_and_save(tmp_path, order):
    overrides = ["clip.model=anther-flowers-32", "clip.pretrained=embedded", "embeddings.every_n_epochs=1"]
    overrides += ["clip.every_n_epochs=1", "samples.per_prompt=1", "samples.weights=[2.0]"]
    names = built("callbacks", "text", tmp_path, *(f"callbacks.{o}" for o in overrides))
    loggers = list(built("logger", "csv", tmp_path).values())
    m = module()
    t = trainer(tmp_path, *list(names.values())[::order], logger=loggers, enable_progress_bar=True)
    t.fit(m, datamodule=Dots())
    assert isinstance(t.callbacks[0], EMA)
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    for stem in ("best_clip-epoch", "best_val_loss-epoch", "last.ckpt"):
        assert len([f for f in files if f.startswith(f"checkpoints/{stem}")]) == 1, files
    assert {"logs/metrics.csv", "plots/val_loss_by_t.png", "embeddings/step-000008.npz"} <= set(files)
    assert Image.open(tmp_path / "samples" / "step-000008.gif").n_frames > 1
    assert "ema" in torch.load(next((tmp_path / "checkpoints").glob("best_val*")), weights_only=True)
    assert "val/clip_score" in (tmp_path / "logs" / "metrics.csv").read_text()


def test_the_default_callbacks_train_a_model_without_a_condition(tmp_path):
    names = built("callbacks", "default", tmp_path)
    t = trainer(tmp_path, *names.values(), enable_progress_bar=True, max_epochs=1)
    t.fit(module(conditional=False), datamodule=Dots())
    assert (tmp_path / "samples" / "step-000004.png").exists()


def test_none_is_nothing(tmp_path):
    assert built("callbacks", "none", tmp_path) == {}
    assert built("logger", "none", tmp_path) == {}


def test_wandb_and_tensorboard_come_beside_the_csv_file(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert list(built("logger", "wandb", tmp_path)) == ["csv", "wandb"]
    assert list(built("logger", "tensorboard", tmp_path)) == ["csv", "tensorboard"]
