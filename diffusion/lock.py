"""One run per folder: a lock that names its owner."""

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from diffusion.errors import AntherError
from diffusion.files import remove_temporaries

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from working in a run's folder, within a block.

    The lock is the kernel's, on the file `.lock`: it ends with its process however that ends, so none is ever stale,
    and where the file system passes locks on (NFS does) it holds between machines. The file itself only says who
    holds it. What a killed run left half written is removed, now that nobody else can be writing it.

    A POSIX lock belongs to a process and not, as that of flock, to what it forks: workers of a loader that outlive a
    killed run for a moment do not hold its folder.

    Raises:
        AntherError: the folder is in use (by whom, where and since when), or cannot be written.
    """
    file = _acquire(folder)
    try:
        if file is not None:
            remove_temporaries(folder)
        yield
    finally:
        if file is not None:
            (folder / LOCK).unlink(missing_ok=True)  # while it is held: see `_acquire`
            file.close()


def _acquire(folder: Path) -> IO[str] | None:
    """The locked file, or None where the file system has no locks."""
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise AntherError(f"cannot write {path}: {error.strerror}; choose another folder or free it.") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise AntherError(
                        f"{folder} is in use{_owner(file)}: wait until it ends, or choose another hydra.run.dir."
                    ) from None
            print(f"{folder} lies where files cannot be locked ({error.strerror}): start no second run in it.")
            return None
        # Its last owner may have removed the file between our opening and our locking it.
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break
        file.close()
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }
    file.truncate(0)
    file.write(json.dumps(owner) + "\n")
    file.flush()
    return file


def _owner(file: IO[str]) -> str:
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return f" by process {owner['pid']} on {owner['host']} since {owner['since']} ({owner['command']})"
    except (ValueError, KeyError, TypeError):
        return ""  # it is being written this moment
