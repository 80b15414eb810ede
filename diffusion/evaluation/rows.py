"""Numbers of many images, a row each, that are read by parts: memory does not grow with the number of images."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from diffusion.errors import AntherError

Array = np.ndarray
Index = slice | Sequence[int] | Array


class Matrix(Protocol):
    """What an array, a memory map, `Rows` and `Derived` have in common: (N, D), read by slices and lists of rows."""

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class Rows:
    """float32 (N, D) in a file.

    Not a memory map, whose pages count as the process's own for as long as the system likes.

    Args:
        file: open for reading, and for writing where rows are appended.
        dim: D.
        count: N.
        offset: bytes before the first row.
    """

    def __init__(self, file: IO[bytes], dim: int, count: int = 0, offset: int = 0) -> None:
        self._file, self._dim, self._count, self._offset = file, dim, count, offset

    @classmethod
    def scratch(cls, folder: Path | str, dim: int) -> "Rows":
        """No rows yet, in a file without a name in a folder; it is gone with its last user."""
        try:
            return cls(tempfile.TemporaryFile(dir=folder), dim)
        except OSError as error:
            raise AntherError(f"cannot write into {folder}: {error.strerror}; choose another folder.") from error

    @classmethod
    def of_npy(cls, path: Path | str) -> "Rows":
        """The float32 array of a `.npy` file, its later axes flattened.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no such file, or not whole.
        """
        file = Path(path).open("rb")  # noqa: SIM115
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        found, size = cls(file, int(np.prod(shape[1:], dtype=int)), shape[0], file.tell()), Path(path).stat().st_size
        if dtype != np.dtype("<f4") or fortran or size != found._offset + 4 * found._count * found._dim:
            raise ValueError(f"{path} holds no rows of float32, or not all of them")
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self._count, self._dim

    def __len__(self) -> int:
        return self._count

    def append(self, rows: Array) -> None:
        """Adds float32 (n, D) at the end.

        Raises:
            AntherError: the disk is full.
        """
        try:
            self._file.seek(self._offset + 4 * self._count * self._dim)
            self._file.write(np.ascontiguousarray(rows, "<f4").data)
            self._file.flush()
        except OSError as error:
            raise AntherError(f"cannot write features: {os.strerror(error.errno or 0)}; free some space.") from error
        self._count += len(rows)

    def __getitem__(self, index: Index) -> Array:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._count)
            if step != 1:
                raise ValueError("rows are read one after the other")
            return self._read(start, max(stop - start, 0))
        chosen = np.asarray(index, np.int64)
        found: Array = np.concatenate([np.empty((0, self._dim), np.float32), *[self._read(row, 1) for row in chosen]])
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self[:] if dtype is None else self[:].astype(dtype)

    def _read(self, start: int, count: int) -> Array:
        if not 0 <= start <= self._count - count:
            raise IndexError(f"there is no row {start} of {self._count}")
        found: Array = np.empty((count, self._dim), np.float32)
        left, place = found.reshape(-1).view(np.uint8).data, self._offset + 4 * start * self._dim
        while left:  # Linux reads at most 2 GiB in a call
            if not (read := os.preadv(self._file.fileno(), [left], place)):
                raise AntherError("a file of features became shorter while it was read: run the same command again.")
            left, place = left[read:], place + read
        return found


class Derived:
    """(N, D) computed from other rows as it is read.

    Args:
        source: N of anything, read by slices and lists of rows.
        compute: n of them -> (n, D).
        dim: D.
    """

    def __init__(self, source: Any, compute: Callable[[Any], Array], dim: int) -> None:
        self._source, self._compute = source, compute
        self.shape = (len(source), dim)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index) -> Array:
        return self._compute(self._source[index])


def parts(n: int, step: int, label: str | None = None) -> Iterator[slice]:
    """The slices of `step` rows that n rows are made of, the last one shorter.

    Args:
        n: how many rows.
        step: rows at a time.
        label: what a progress bar says; without it, or for few parts, there is none.
    """
    from rich.console import Console
    from rich.progress import track

    few = label is None or n <= 2 * step
    starts = track(range(0, n, step), label or "", transient=True, console=Console(stderr=True), disable=few)
    for start in starts:
        yield slice(start, min(start + step, n))
