"""The commands in forked processes: torch is imported once, and a process that is killed costs a second, not ten.

A child has the parent's modules and nothing else of it: it runs the command as a shell would, from its argument list to
its exit status.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Ended(NamedTuple):
    """How a command ended: its status (minus the signal's number where one killed it), and what it printed."""

    status: int
    printed: str
    seconds: float


def fork(script: str, words: list[str], log: Path, prepare: Callable[[], None] | None = None) -> int:
    """Starts `python SCRIPT WORDS...` in a fork of this process and returns its id.

    Args:
        script: train.py or evaluate.py.
        words: its arguments.
        log: file that gets its output.
        prepare: called in the child before the command.
    """
    import evaluate
    import train
    from diffusion import cli

    # Everything that the commands import inside functions, so that a child need not.
    import diffusion.evaluation.run
    import diffusion.training

    assert diffusion.evaluation.run
    assert diffusion.training
    module = {"train.py": train, "evaluate.py": evaluate}[script]
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := os.fork()) > 0:
        return pid
    status = 70
    try:
        with log.open("ab") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))  # noqa: PTH123, SIM115
        sys.argv = [str(ROOT / script), *words]
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ["COLUMNS"] = "200"
        if prepare is not None:
            prepare()
        cli.run(module.main, module.job)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # nothing of the parent's, such as pytest's end, may run here


def run(
    script: str,
    words: list[str],
    log: Path,
    kill_after: float | None = None,
    prepare: Callable[[], None] | None = None,
    kill_when: Callable[[], bool] | None = None,
    with_signal: int = signal.SIGKILL,
    timeout: float = 120,
) -> Ended:
    """Runs a command to its end.

    Args:
        script: see `fork`.
        words: see `fork`.
        log: see `fork`.
        kill_after: seconds until it gets the signal.
        prepare: see `fork`.
        kill_when: instead, it gets the signal as soon as this is true.
        with_signal: the signal.
        timeout: seconds after which the test fails.
    """
    start_of_log = log.stat().st_size if log.exists() else 0
    started = time.monotonic()
    pid = fork(script, words, log, prepare)
    sent = False
    while True:
        done, code = os.waitpid(pid, os.WNOHANG)
        seconds = time.monotonic() - started
        if done:
            break
        due = (kill_after is not None and seconds >= kill_after) or (kill_when is not None and kill_when())
        if due and not sent:
            os.kill(pid, with_signal)
            sent = True
        if seconds > timeout:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(log.read_text())
        time.sleep(0.002)
    printed = log.read_bytes()[start_of_log:].decode()
    return Ended(os.waitstatus_to_exitcode(code), printed, seconds)
