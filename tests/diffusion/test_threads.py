"""OpenMP tells itself how its threads wait when it is loaded."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffusion.curation import dataset
from diffusion.evaluation import plots
from tests.diffusion.evaluation.fake_run import PROMPTS, make_run

LOADS_TORCH = "from diffusion import cli; cli.run(lambda: __import__('torch'))"


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings another OpenMP elsewhere")
@pytest.mark.parametrize(("chosen", "found"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_the_commands_threads_sleep_unless_told_otherwise(chosen, found):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({} if chosen is None else {"OMP_WAIT_POLICY": chosen})
    done = subprocess.run([sys.executable, "-c", LOADS_TORCH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"OMP_WAIT_POLICY = '{found}'" in done.stderr


@pytest.fixture
def threads():
    """Another number than any library would set."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_umap_of_the_plots_leaves_the_number_of_threads(tmp_path, threads, monkeypatch):
    class Greedy:
        """As numba does, which is loaded once for all tests."""

        def __init__(self, **options):
            pass

        def fit_transform(self, points):
            torch.set_num_threads(2)
            return points[:, :2]

    monkeypatch.setattr("umap.UMAP", Greedy)
    frame = make_run(tmp_path, 40, prompts=PROMPTS[:2])
    np.save(tmp_path / "embeddings.npy", np.random.default_rng(0).normal(size=(40, 8)).astype("f4"))
    assert plots._embeddings(tmp_path, frame, plots._units(tmp_path))["embedding_prompt"] is not None
    assert torch.get_num_threads() == threads


def test_umap_of_the_data_set_leaves_the_number_of_threads(threads, monkeypatch):
    def greedy(*args, **options):
        torch.set_num_threads(2)

    brain = pytest.importorskip("fiftyone.brain")
    monkeypatch.setattr(brain, "compute_visualization", greedy)
    dataset._visualise(None, np.zeros((20, 1)), [])
    assert torch.get_num_threads() == threads
