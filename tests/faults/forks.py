"""The commands in forked processes: torch is imported once, and a process that is killed costs a second, not ten.

`python -m tests.faults.forks` is the server: it runs each command once in itself, which imports all that they need, and
from then on forks for every line that it reads. A child has the server's modules and nothing else of it: it runs the
command as a shell would, from its argument list to its exit status. The tests talk to it by `Forks`; in pytest's own
process forks and the threads of other tests would not go together.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        status: of its exit, or minus the number of the signal that killed it.
        printed: on both streams.
        seconds: that it took.
    """

    status: int
    printed: str
    seconds: float


class Forks:
    """The tests' side of a server.

    Args:
        folder: for what the commands print.
    """

    def __init__(self, folder: Path) -> None:
        self.log = folder / "printed"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forks", str(self.log)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *words: str, **how: Any) -> Ended:
        """Runs `python SCRIPT WORDS...` to its end.

        Args:
            script: train.py or evaluate.py.
            *words: its arguments.
            **how: `inside=True`: in the server itself, which has everything imported after that. `after`: seconds, or
                `at_step`: optimizer steps, after which the command gets the signal `number` (SIGKILL). `room`: bytes
                that a file may have. `environment`: more variables, or None for fewer. `clock`:
                seconds by which the clock is wrong.
        """
        start = self.log.stat().st_size if self.log.exists() else 0
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"script": script, "words": words, **how}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        printed = self.log.read_bytes()[start:].decode() if self.log.exists() else ""
        if not answer:
            raise RuntimeError(f"the server of forks ended with {self._process.wait()}: {printed}")
        status, seconds = json.loads(answer)
        return Ended(status, printed, seconds)

    def close(self) -> None:
        """Ends the server."""
        self._process.communicate(timeout=30)


# The server's side ----------------------------------------------------------------------------------------------------


def serve(log: Path) -> None:
    """Answers each line of the standard input with a line: status and seconds."""
    answers = os.fdopen(os.dup(1), "w")
    _print_to(log)
    for line in sys.stdin:
        how = json.loads(line)
        script, words = how.pop("script"), how.pop("words")
        started = time.monotonic()
        status = command(script, words) if how.pop("inside", False) else fork(script, words, **how)
        answers.write(json.dumps([status, time.monotonic() - started]) + "\n")
        answers.flush()


def command(script: str, words: list[str]) -> int:
    """Runs a command in this process and returns its exit status."""
    import evaluate
    import train
    from diffusion import cli

    module = {"train.py": train, "evaluate.py": evaluate}[script]
    sys.argv = [str(ROOT / script), *words]
    try:
        cli.run(module.main, several=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def fork(
    script: str,
    words: list[str],
    after: float | None = None,
    at_step: int | None = None,
    number: int = signal.SIGKILL,
    room: int | None = None,
    environment: dict[str, str | None] | None = None,
    clock: float = 0.0,
) -> int:
    """See `Forks.run`."""
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := os.fork()) == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for name, value in (environment or {}).items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            now = time.time
            time.time = lambda: now() + clock
            if room is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            if at_step is not None:
                _signal_at_step(at_step, number)
            status = command(script, words)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)  # nothing of the server's may run here
    due = None if after is None else time.monotonic() + after
    deadline = time.monotonic() + 300
    while True:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(code)
        if due is not None and time.monotonic() >= due:
            os.kill(pid, number)
            due = None
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGABRT)
        time.sleep(0.002)


def _signal_at_step(step: int, number: int) -> None:
    """This process gets a signal in the middle of the step that follows so many others."""
    from diffusion.modules.diffusion import Diffusion

    whole = Diffusion.training_step

    def training_step(self: Diffusion, *arguments: Any) -> Any:
        loss = whole(self, *arguments)
        if self.trainer.global_step == step:
            os.kill(os.getpid(), number)
        return loss

    Diffusion.training_step = training_step  # type: ignore[method-assign]


def _print_to(log: Path) -> None:
    file: IO[bytes] = log.open("ab")
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1) for stream in (1, 2))  # noqa: PTH123, SIM115


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
