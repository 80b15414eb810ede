"""Jobs for `test_ranks.py`: what a rank may do, without torch; rank 0 starts the others as Lightning does."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from diffusion.errors import AntherError

RANK = int(os.environ.get("LOCAL_RANK", "0"))


def start_others(folder: Path) -> None:
    if RANK == 0:
        subprocess.Popen([sys.executable, "-m", "diffusion.ranks"], env={**os.environ, "LOCAL_RANK": "1"})
    (folder / f"pid{RANK}").write_text(str(os.getpid()))
    while len(list(folder.glob("pid?"))) < 2:
        time.sleep(0.02)


def answers(config: dict[str, Any], folder: Path) -> float:
    start_others(folder)
    return float(config["x"]) + RANK


def refuses(config: dict[str, Any], folder: Path) -> None:
    raise AntherError("x is a bad value.")


def breaks(config: dict[str, Any], folder: Path) -> None:
    raise ZeroDivisionError("x is a surprise")


def is_killed(config: dict[str, Any], folder: Path) -> None:
    start_others(folder)
    if RANK == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def follower_refuses(config: dict[str, Any], folder: Path) -> None:
    """Rank 1 is the cause; rank 0 only loses it, as gloo says it, and later."""
    start_others(folder)
    if RANK == 1:
        raise AntherError("rank 1 has seen a bad value.")
    time.sleep(1)
    import torch  # noqa: F401 - as in every job that trains

    raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:20871")


def waits(config: dict[str, Any], folder: Path) -> None:
    """For ever, but it answers SIGTERM as a training does."""

    def stop(*_: Any) -> None:
        (folder / f"stopped{RANK}").write_text("")
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    start_others(folder)
    (folder / f"waits{RANK}").write_text("")
    while True:
        time.sleep(0.05)


def logs(config: dict[str, Any], folder: Path) -> None:
    logging.getLogger("anther").info("this goes to the log of the run")


def gets_sigterm(config: dict[str, Any], folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def gets_sigint(config: dict[str, Any], folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGINT)
