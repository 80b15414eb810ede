"""Embeddings that somebody else computed: the course's `clip.csv`, or npz."""

import csv
import itertools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffusion.conditioning.base import Conditioner, RowTable
from diffusion.conditioning.labels import find_class
from diffusion.errors import AntherError

if TYPE_CHECKING:
    from datamodules.base import ImageTable


class EmbeddingTable(Conditioner):
    """Reads the condition of each image from a file, whatever model made it.

    There is no text tower here, so a prompt becomes a condition in one of two ways: `prompts` has it, or it names one
    class of the file ("a photo of a rose"), and its condition is the most typical row of that class: the one with
    the greatest mean cosine to the others. (The mean of a class looks like no image; see
    docs/results.md.) The class of a row is the folder that holds it in its path.

    Args:
        path: the course's csv (`path, e0, e1, ...`, one row per image, with or without a header) or an npz with `path`
            (N,) and `embedding` (N, D).
        prompts: a second file (csv with `prompt, e0, ...`, npz with `prompt` and `embedding`), or a mapping from
            prompts to classes of the file.
    """

    def __init__(self, path: str | Path, prompts: str | Path | Mapping[str, str] | None = None) -> None:
        self.path = Path(path).expanduser()
        self.prompts = prompts
        self._rows: RowTable | None = None

    @property
    def dim(self) -> int:
        """Numbers per row of the file."""
        return self._file[1].shape[1]

    @property
    def files(self) -> tuple[Path, ...]:
        """What is read."""
        by_prompt = self.prompts is None or isinstance(self.prompts, Mapping)
        return (self.path,) if by_prompt else (self.path, Path(str(self.prompts)).expanduser())

    @cached_property
    def _file(self) -> tuple[list[str], Tensor]:
        names, rows = read_embeddings(self.path, "path")
        return [name.replace("\\", "/") for name in names], rows

    @cached_property
    def _prompts(self) -> dict[str, Tensor]:
        """Embeddings of the prompts that are known word for word."""
        if self.prompts is None:
            return {}
        if isinstance(self.prompts, Mapping):
            unknown = sorted(set(self.prompts.values()) - set(self._classes))
            if unknown:
                raise AntherError(
                    f"conditioner.prompts names {', '.join(unknown)}, which {self.path} does not have; "
                    f"its classes: {self._class_list()}."
                )
            return {prompt: self._classes[name] for prompt, name in self.prompts.items()}
        path = Path(self.prompts).expanduser()
        names, rows = read_embeddings(path, "prompt")
        if rows.shape[1] != self.dim:
            raise AntherError(
                f"{path} has embeddings of {rows.shape[1]} numbers and {self.path} of {self.dim}; "
                "make both with the same model."
            )
        return dict(zip(names, rows, strict=True))

    @cached_property
    def _classes(self) -> dict[str, Tensor]:
        """The most typical row of each class; classes are the folders of the file's paths."""
        names, rows = self._file
        folders = [PurePosixPath(name).parent.name for name in names]
        classes = sorted(set(folders) - {""})
        return {c: most_typical(rows[[k for k, folder in enumerate(folders) if folder == c]]) for c in classes}

    def prepare(self, table: "ImageTable") -> None:
        """Finds the row of every image: by path, else by class and file name, else by file name where it is unique.

        Raises:
            AntherError: the file cannot be read, or has no row for some images.
        """
        names, rows = self._file
        found = match_rows(table.names, names)
        missing = [name for name, row in zip(table.names, found, strict=True) if row is None]
        if missing:
            raise AntherError(
                f"{self.path} has no row of its own for {len(missing)} of {len(found)} images "
                f"(first: {', '.join(missing[:3])}); compute their embeddings, or use the images that it was made from."
            )
        self._rows = RowTable(rows[[row for row in found if row is not None]])

    def lookup(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (B, dim) of the rows `index` of the table given to `prepare`."""
        if self._rows is None:
            raise RuntimeError("EmbeddingTable.lookup before EmbeddingTable.prepare")
        return self._rows[batch["index"]]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Conditions (n, dim): a prompt's own embedding if there is one, else the most typical row of its class.

        Raises:
            AntherError: a prompt is neither.
        """
        return torch.stack([self._encode(prompt) for prompt in prompts]) if prompts else torch.zeros(0, self.dim)

    def describe(self) -> str:
        """Name of the file, and width."""
        way = "file" if self.prompts else "typical row"
        return f"embeddings of {self.path.name} ({self.dim} numbers); prompts by {way}"

    def _encode(self, prompt: str) -> Tensor:
        if prompt in self._prompts:
            return self._prompts[prompt]
        classes = list(self._classes)
        try:
            return self._classes[classes[find_class(prompt, classes)]]
        except AntherError as error:
            raise AntherError(
                f'there is no text encoder behind {self.path} and the prompt "{prompt}" does not name exactly one of '
                f"its classes ({self._class_list()}); name one, or give its embedding in conditioner.prompts."
            ) from error

    def _class_list(self) -> str:
        classes = list(self._classes)
        return (", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")) or "it has none"


def most_typical(rows: Tensor) -> Tensor:
    """The row (D,) of (N, D) with the greatest mean cosine to all of them."""
    units = normalize(rows, dim=1)
    return rows[(units @ units.mean(0)).argmax()]


def match_rows(names: Sequence[str], paths: Sequence[str]) -> list[int | None]:
    """For each name the position of its path, or None.

    The longest common tail decides: the whole path, then folder and file, then the file alone. A tail that several
    names or several paths share decides nothing.
    """
    theirs = [PurePosixPath(path).parts for path in paths]
    ours = [PurePosixPath(name).parts for name in names]
    found: list[int | None] = [None] * len(ours)
    for depth in (None, 2, 1):
        position = _unique_tails(theirs, depth)
        mine = _unique_tails(ours, depth)
        for tail, k in mine.items():
            if found[k] is None:
                found[k] = position.get(tail)
    return found


def _unique_tails(paths: Sequence[tuple[str, ...]], depth: int | None) -> dict[tuple[str, ...], int]:
    """The last `depth` parts (all if None) -> position, for tails that only one path has."""
    positions: dict[tuple[str, ...], list[int]] = {}
    for k, parts in enumerate(paths):
        positions.setdefault(parts if depth is None else parts[-depth:], []).append(k)
    return {tail: found[0] for tail, found in positions.items() if len(found) == 1}


def read_embeddings(path: Path, key: str) -> tuple[list[str], Tensor]:
    """Reads a csv (`key, e0, e1, ...`, with or without that header) or an npz (`key`, `embedding`).

    Returns:
        N keys, and float32 (N, D).

    Raises:
        AntherError: the file is missing, malformed, or holds numbers that are not finite.
    """
    if not path.is_file():
        raise AntherError(
            f"the table of embeddings {path} does not exist; set conditioner.path to a .csv or .npz file, or for a "
            "model that was trained with it bring it back there."
        )
    try:
        names, rows = _read_npz(path, key) if path.suffix == ".npz" else _read_csv(path, key)
    except (ValueError, KeyError, OSError, EOFError, MemoryError, zipfile.BadZipFile, csv.Error) as error:
        raise AntherError(
            f"{path} is not a table of embeddings ({error}); expected a csv with the columns {key}, e0, e1, ... "
            f"or an npz with the arrays {key} and embedding."
        ) from error
    if rows.ndim != 2 or len(rows) != len(names) or rows.size == 0:
        raise AntherError(
            f"{path} has {len(names)} values of {key} and embeddings of shape {rows.shape}; give one each."
        )
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(bad):
        raise AntherError(f"{path}: {len(bad)} rows are not finite (first: {names[bad[0]]}); compute them again.")
    return names, torch.from_numpy(rows)


def _read_npz(path: Path, key: str) -> tuple[list[str], np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > max(2**28, 100 * path.stat().st_size):
            raise ValueError("it grows to more than 100 times its size, which embeddings never do")
    with np.load(path, allow_pickle=False) as file:
        return [str(name) for name in file[key]], file["embedding"].astype(np.float32)


def _is_row(line: Sequence[str]) -> bool:
    """Whether the first line of a file is no header but a name and its numbers."""
    try:
        return len([float(field) for field in line[1:]]) > 0
    except ValueError:
        return False


def _read_csv(path: Path, key: str) -> tuple[list[str], np.ndarray]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines: Iterator[list[str]] = csv.reader(file)
        header = [column.strip() for column in next(lines, [])]
        if header[:1] != [key] and _is_row(header):  # as the course writes it
            lines = itertools.chain([header], lines)
            header = [key, *(f"e{k}" for k in range(len(header) - 1))]
        columns = [header.index(f"e{k}") for k in range(sum(c[:1] == "e" and c[1:].isdecimal() for c in header))]
        if not columns:
            raise ValueError("no columns e0, e1, ...")
        name = header.index(key)
        names, rows = [], []
        for number, line in enumerate(lines, 2):
            if not line:
                continue
            if len(line) != len(header):
                raise ValueError(f"line {number} has {len(line)} fields, the header {len(header)}")
            names.append(line[name])
            rows.append(np.array([line[k] for k in columns], dtype=np.float32))
    return names, np.array(rows, dtype=np.float32)
