import json
import os
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from diffusion.errors import AntherError
from diffusion.files import atomic
from diffusion.lock import LOCK, locked

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import os, sys
from pathlib import Path
from diffusion.lock import locked
with locked(Path(sys.argv[1])):
    if sys.argv[2:] == ["fork"] and os.fork() == 0:
        print(os.getpid(), flush=True)
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder, *words):
    command = [sys.executable, "-c", HOLD, str(folder), *words]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in range(1 + len(words)):
        process.stdout.readline()
    return process


def test_a_folder_in_use_names_its_owner_and_is_free_at_the_end(tmp_path):
    process = hold(tmp_path)
    with pytest.raises(AntherError, match="choose another") as refusal, locked(tmp_path):
        pass
    said = str(refusal.value)
    assert f"{tmp_path} is in use by process {process.pid} on {socket.gethostname()} since " in said
    since = datetime.fromisoformat(said.split(" since ")[1].split(" ")[0])
    assert abs(time.time() - since.timestamp()) < 60
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid, "asking must not write"
    process.communicate("", timeout=30)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("words", [[], ["fork"]], ids=["alone", "with a fork that lives on"])
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, words):
    process = hold(tmp_path, *words)
    with atomic(tmp_path / "images" / "0.png") as temporary:
        half = tmp_path / "images" / f"{temporary.name}x"  # as a kill leaves it
    half.write_text("half")
    other = tmp_path / "evaluation" / ".hydra"
    other.mkdir(parents=True)
    theirs = other.parent / half.name  # of a run in a folder inside, which has a lock of its own
    theirs.write_text("half")
    process.kill()
    process.wait()
    with locked(tmp_path):
        assert not half.exists()
        assert theirs.exists()
    process.stdin.close()


def test_ten_at_once_and_one_gets_it(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipe) for _ in range(10)]
    deadline = time.monotonic() + 60
    while sum(process.poll() is None for process in processes) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    (winner,) = [process for process in processes if process.poll() is None]
    assert winner.communicate("", timeout=30)[0] == "held\n"
    losers = [process.communicate()[1] for process in processes if process is not winner]
    assert all(f"by process {winner.pid} " in said for said in losers), losers


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AntherError, match="cannot write"), locked(tmp_path / "file" / "run"):
        pass
