"""Files that are whole or absent, and their hashes."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion.errors import AntherError


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
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
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


def sha256(path: Path | str) -> str:
    """Hex digest of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
