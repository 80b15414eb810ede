"""What every test gets: a cache of its own session, quiet W&B, and the real data where there are some."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests never read or fill the user's cache; subprocesses inherit the folder."""
    os.environ["ANTHER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["WANDB_MODE"] = "offline"
    os.environ["WANDB_SILENT"] = "true"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with cropped_flowers.zip, flowers102.zip and mnist/; set ANTHER_TEST_DATA to have these tests run."""
    folder = os.environ.get("ANTHER_TEST_DATA")
    if not folder:
        pytest.skip("ANTHER_TEST_DATA is not set")
    return Path(folder)
