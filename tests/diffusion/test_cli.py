import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAY = """
import sys
from diffusion import cli
def main():
    print(sys.argv[1])
    open(sys.argv[2], "w").write(sys.argv[1])
cli.run(main)
"""
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("more", [{}, {"LC_ALL": "C"}, PLAIN], ids=["own", "C", "ASCII"])
def test_any_letters_in_any_locale(tmp_path, more):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    words = "eine weiße Blüte, 雏菊"
    command = [sys.executable, "-c", SAY, words.encode(), str(tmp_path / "file")]
    done = subprocess.run(command, cwd=ROOT, env=env | more, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "file").read_bytes() == words.encode()
    shown = words.encode("ascii", "backslashreplace") if more == PLAIN else words.encode()
    assert done.stdout.strip() == shown


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_command_with_a_sentence_and_its_status(name, tmp_path):
    code = f"""
import signal
from pathlib import Path
from diffusion import cli, ranks
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
job = "tests.diffusion.rank_jobs.gets_{name.lower()}"
cli.run(lambda: ranks.leader.run(job, {{"trainer": {{}}}}, Path({str(tmp_path)!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == {"SIGTERM": 143, "SIGINT": 130}[name]
    assert done.stderr.startswith(f"stopped by {name}: the same command with hydra.run.dir={tmp_path} goes on")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("word", ["hydra.run.dir=", "hydra.sweep.dir=''", "++hydra.run.dir="])
def test_an_empty_folder_is_not_the_current_one(word, tmp_path):
    """As of a variable of the shell that is not set; Hydra would write into the current directory."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), word]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {word.strip('+').partition('=')[0]}= is empty: ")
    assert not list(tmp_path.iterdir())
