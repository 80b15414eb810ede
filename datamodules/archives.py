"""Archives unpacked whole or not at all, and never outside their folder."""

import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from diffusion.errors import AntherError

MAX_BYTES = 64 * 2**30
"""More than this an archive may not unpack to."""

MAX_RATIO = 100
"""Nor to this many times its own size, beyond the first 256 MiB: pictures hardly shrink, bombs do."""

MAX_FILES = 5_000_000
"""Nor may it have more members than this, however small: a disk runs out of names, too."""

_FREE_BYTES = 256 * 2**20

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2", ".avif"}


def extract(archive: Path, target: Path) -> Path:
    """Unpacks a zip or tar (plain, gz, bz2, xz) as the folder `target`, unless it is there already.

    Dot files and `__MACOSX` are left out. A top folder around the folders of the data is left out too, so archives
    with and without one give the same tree. All is written beside `target` and renamed at the end.

    Args:
        archive: the file.
        target: a folder that does not exist yet, or a finished one.

    Returns:
        `target`.

    Raises:
        AntherError: the archive is damaged, encrypted or empty; or it holds a path that leads outside, a link or a
            device; or it would unpack to far more than pictures can.
    """
    if target.is_dir():
        return target
    budget = min(MAX_BYTES, max(_FREE_BYTES, MAX_RATIO * archive.stat().st_size))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise AntherError(f"cannot unpack into {target.parent}: {error.strerror}; choose another folder.") from error
    try:
        with _whole(archive):
            for number, (name, source) in enumerate(_members(archive)):
                if number >= MAX_FILES:
                    raise AntherError(
                        f"{archive} was not unpacked: it holds more than {MAX_FILES:,} files; unpack it yourself if "
                        "you trust it, and give the folder."
                    )
                path = temporary / _inside(name, archive)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    budget = _copy(source, file, budget, archive)
        root = content_root(temporary)
        if not any(root.iterdir()):
            raise AntherError(f"{archive} holds no files; give an archive with one folder of images per class.")
        # mkdtemp makes private folders; data is as readable as the user's other files.
        root.chmod(0o755)
        _rename(root, target)
    except OSError as error:
        raise AntherError(
            f"cannot unpack {archive} into {target.parent}: {error.strerror or error}; free some space or choose "
            "another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def content_root(folder: Path) -> Path:
    """The folder that holds the class folders: `folder`, or the only folder in it if that holds folders itself.

    A folder with images of its own is never passed over.
    """
    while not any(path.suffix.lower() in IMAGE_SUFFIXES and not hidden(path.name) for path in folder.iterdir()):
        inner = [path for path in folder.iterdir() if path.is_dir() and not hidden(path.name)]
        if len(inner) != 1 or not any(path.is_dir() and not hidden(path.name) for path in inner[0].iterdir()):
            return folder
        folder = inner[0]
    return folder


def hidden(name: str) -> bool:
    """Whether an entry is a dot file or what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


@contextmanager
def _whole(archive: Path) -> Iterator[None]:
    damage = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError)
    try:
        yield
    except damage as error:
        # Faults of the disk have a number, a gzip file's have none.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise AntherError(f"{archive} is damaged or encrypted ({error}); get it again.") from error


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if zipfile.is_zipfile(archive):
        yield from _zip_members(archive)
    elif tarfile.is_tarfile(archive):
        yield from _tar_members(archive)
    else:
        raise AntherError(f"{archive} is no whole zip or tar archive; get it again.")


def _zip_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            kind = info.external_attr >> 28  # The file type of the Unix mode; 0 where there is none.
            if kind not in (0, 0o04, 0o10):
                raise _unsafe(archive, info.filename, "a link or a device")
            _inside(info.filename, archive)
            if not info.is_dir() and not _left_out(info.filename):
                with file.open(info) as source:
                    yield info.filename, source


def _tar_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(archive) as file:
        for info in file:
            if not info.isfile() and not info.isdir():
                raise _unsafe(archive, info.name, "a link or a device")
            _inside(info.name, archive)
            source = None if _left_out(info.name) else file.extractfile(info)
            if source is not None:
                yield info.name, source
        # tarfile stops in silence at a damaged header, and before the checksum at the end of a gzip file.
        assert file.fileobj is not None
        while rest := file.fileobj.read(1 << 20):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("a header is damaged")


def _inside(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]) or "\0" in name:
        raise _unsafe(archive, name, "a path that leads outside")
    return path


def _left_out(name: str) -> bool:
    return any(hidden(part) for part in PurePosixPath(name.replace("\\", "/")).parts)


def _unsafe(archive: Path, name: str, what: str) -> AntherError:
    return AntherError(f"{archive} was not unpacked: its member {name!r} is {what}; use an archive of plain files.")


def _copy(source: IO[bytes], target: IO[bytes], budget: int, archive: Path) -> int:
    # Counts what comes out, not what the headers promise.
    while chunk := source.read(1 << 20):
        budget -= len(chunk)
        if budget < 0:
            raise AntherError(
                f"{archive} was not unpacked: it grows to more than {MAX_RATIO} times its size, which pictures never "
                "do; unpack it yourself if you trust it, and give the folder."
            )
        target.write(chunk)
    return budget


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        # Another process may have finished first.
        if not target.is_dir():
            raise
