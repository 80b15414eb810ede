"""Commands that are killed at random moments and run again leave what an uninterrupted run leaves, to the bit."""

import random
from pathlib import Path

import pytest

from diffusion.files import TEMPORARY
from diffusion.lock import LOCK
from tests.faults.forks import Forks
from tests.faults.small import EVALUATE, TRAIN, difference, evaluated, files, trained

KILLS = 20
SEED = 0


def chain(forks: Forks, words: list[str], folder: Path, life: float, rng: random.Random) -> int:
    """Kills a command at random moments of its life until one attempt is through; returns the number of kills."""
    kills = 0
    while True:
        # Later and later, so that it ends on a machine that has become slower, too.
        moment = rng.uniform(0, life * (1 + kills / 5))
        ended = forks.run(*words, f"hydra.run.dir={folder}", after=moment)
        if ended.status == 0:
            return kills
        assert ended.status == -9, f"after {kills} kills: {ended.printed}"
        kills += 1
        halves = [name for name in (files(folder) if folder.exists() else []) if TEMPORARY in name]
        print(f"killed after {moment:.2f} of {life:.2f} s", *halves)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_kills_change_nothing(command: str, forks: Forks, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    rng = random.Random(f"{command} {SEED}")
    trained_whole: Path = request.getfixturevalue("whole")
    if command == "train":
        words, look, there = ["train.py", *TRAIN], trained, trained_whole
    else:
        there = request.getfixturevalue("whole_evaluation")
        words, look = ["evaluate.py", f"ckpt={trained_whole}/checkpoints/last.ckpt", *EVALUATE], evaluated
    again = forks.run(*words, f"hydra.run.dir={tmp_path / 'again'}")
    assert again.status == 0, again.printed
    assert difference(look(there), look(tmp_path / "again")) is None, "two uninterrupted runs differ"
    kills = number = 0
    while kills < KILLS:
        folder = tmp_path / f"chain{number}"
        kills += chain(forks, words, folder, again.seconds, rng)
        assert difference(look(there), look(folder)) is None, f"seed {SEED}, chain {number}, {folder}"
        assert not (folder / LOCK).exists()
        number += 1
    print(f"{kills} kills in {number} chains")
