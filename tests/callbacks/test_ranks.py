import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from callbacks.clip import GenerationClipScore
from callbacks.ema import EMA
from callbacks.embeddings import BottleneckEmbeddings
from callbacks.nan_guard import NanGuard
from callbacks.record import RunRecord
from callbacks.samples import SampleGrid
from callbacks.throughput import Throughput
from callbacks.timestep_loss import TimestepLoss
from diffusion.loggers import CSVLog
from tests.callbacks.tiny_training import Dots, module, trainer


def train(folder: Path, devices: int) -> None:
    """All callbacks at once; each rank writes what it logged."""
    t = trainer(
        folder,
        EMA(),
        NanGuard(),
        Throughput(),
        RunRecord(),
        SampleGrid(folder / "samples", ["a daisy"], [2.0], every_n_epochs=1),
        GenerationClipScore(
            ["a photo of a daisy", "two roses", "a tulip"], [2.0], "anther-flowers-32", "embedded", every_n_epochs=1
        ),
        BottleneckEmbeddings(folder / "embeddings", prompts=["a daisy"], every_n_epochs=1),
        TimestepLoss(folder / "plots"),
        LastCheckpoint(folder / "checkpoints", every_n_steps=1, share=1.0),
        BestCheckpoint(dirpath=folder / "checkpoints", filename="best{epoch}", monitor="val/clip_score", mode="max"),
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=CSVLog(folder / "metrics.csv"),
    )
    t.fit(module(), datamodule=Dots())
    values = {name: float(t.callback_metrics[name]) for name in ("val/clip_score", "val/loss")}
    (folder / f"rank{t.global_rank}.json").write_text(json.dumps(values))


@pytest.mark.slow
def test_two_ranks_do_not_wait_for_each_other_and_agree(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.callbacks.test_ranks", str(tmp_path), "2"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    ranks = [json.loads((tmp_path / f"rank{k}.json").read_text()) for k in range(2)]
    assert ranks[0] == ranks[1]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert (tmp_path / "samples" / "step-000004.gif").exists()
    assert (tmp_path / "embeddings" / "step-000004.npz").exists()


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
