"""What every test gets: a cache of its own session and quiet W&B."""

import os

import pytest

from diffusion.threads import wait_passively

wait_passively()  # before any test imports torch


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests never read or fill the user's cache; subprocesses inherit the folder."""
    os.environ["ANTHER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["WANDB_MODE"] = "offline"
    os.environ["WANDB_SILENT"] = "true"
