"""One server of forks, and the uninterrupted runs that everything is compared with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.forks import Forks
from tests.faults.small import EVALUATE, TRAIN


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory, _own_cache: None) -> Iterator[Forks]:
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended = forks.run("train.py", *TRAIN, f"hydra.run.dir={folder}", inside=True)
    assert ended.status == 0, ended.printed
    return folder


@pytest.fixture(scope="session")
def whole_evaluation(forks: Forks, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted evaluation of that training."""
    folder = tmp_path_factory.mktemp("whole_evaluation") / "run"
    words = [f"ckpt={whole}/checkpoints/last.ckpt", *EVALUATE, f"hydra.run.dir={folder}"]
    ended = forks.run("evaluate.py", *words, inside=True)
    assert ended.status == 0, ended.printed
    return folder
