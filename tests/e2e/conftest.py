"""Ways to run the commands: as a person does, and in process where importing torch each time would cost too much."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import analyze
import evaluate
import sample
import train
from diffusion import cli

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs `python SCRIPT OVERRIDES...` in the project's folder and returns what it printed."""

    def run(script: str, *overrides: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, script, *overrides],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Runs a command in this process, from its own argument list, and returns the folder of the run."""

    def run(script: str, *overrides: str, folder: Path | None = None) -> Path:
        folder = folder or tmp_path / "run"
        mains = {"train.py": train.main, "sample.py": sample.main, "evaluate.py": evaluate.main}
        main = (mains | {"analyze.py": analyze.main})[script]
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *overrides, f"hydra.run.dir={folder}"])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        cli.run(main)
        return folder

    return run


@pytest.fixture
def refused(call: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with one sentence, and returns that sentence."""

    def run(script: str, *overrides: str, folder: Path | None = None) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            call(script, *overrides, folder=folder)
        assert stopped.value.code == 1
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, lines
        return lines[0]

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, command: Run) -> Path:
    """The checkpoint of a tiny model of the demo, after two steps."""
    folder = tmp_path_factory.mktemp("trained")
    tiny = ["data.n_train=64", "data.n_val=16", "data.batch_size=8", "network.down_chs=[32,32,32]", "callbacks=fit"]
    done = command("train.py", "experiment=demo", *tiny, "trainer.max_steps=2", f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes of small pictures, in the shape of the cropped flowers."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos") / "cropped_flowers"
    rng = np.random.default_rng(0)
    for name in ("daisy", "roses", "sunflowers"):
        (folder / name).mkdir(parents=True)
        for k in range(8):
            pixels = rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}_{k}.jpg")
    return folder
