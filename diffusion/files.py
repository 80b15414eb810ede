"""Files that are whole or absent, and their hashes."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion.errors import AntherError

TEMPORARY = ".part-"
"""How the names of files begin that are not whole yet."""


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path` that takes its name if the block succeeds.

    The suffix is kept, since writers choose formats by it. On any error the temporary file is removed and a file that
    stood at `path` stays as it was.

    Raises:
        AntherError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY}{path.stem}-", suffix=path.suffix)
    except OSError as error:
        raise AntherError(f"cannot write {path}: {error.strerror}; choose another folder or free it.") from error
    os.close(handle)
    temporary = Path(name)
    # mkstemp makes private files; results are as readable as any other file of the user.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.errno is None:
            raise
        raise AntherError(
            f"cannot write {path}: {os.strerror(error.errno)}; free some space or choose another folder."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def keep_as(path: Path, kept: Path) -> None:
    """Gives the content of a file a second name, in place of what had that name; `path` is there all the time.

    Raises:
        AntherError: as `atomic`.
    """
    with atomic(kept) as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)


def remove_temporaries(folder: Path) -> None:
    """Removes what a killed process left half written in a run's folder; runs in folders inside it are left alone."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not (Path(root) / name / ".hydra").exists()]
        for name in files:
            if name.startswith(TEMPORARY):
                (Path(root) / name).unlink(missing_ok=True)


def sha256(path: Path | str) -> str:
    """Hex digest of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
