"""The list of images to leave out of a data set: a CSV that a person can read and edit."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from diffusion.errors import AntherError
from diffusion.files import atomic


@dataclass(frozen=True)
class Exclusion:
    """One line of the list.

    Attributes:
        name: of the image in its table.
        reason: one word, such as `near_duplicate`.
        details: what was measured.
        kept: of a duplicate, the name of the image that stays.
        split: where the image was when the list was made.
    """

    name: str
    reason: str = ""
    details: str = ""
    kept: str = ""
    split: str = ""


COLUMNS = tuple(field.name for field in fields(Exclusion))
# A file's name may begin or end with a space.
NAMES = ("name", "kept")


def read_exclusions(path: Path) -> tuple[Exclusion, ...]:
    """Reads a list; columns other than `name` may be missing, and lines without a name do not count.

    Names stay as they are, and the other columns lose the spaces around them.

    Raises:
        AntherError: there is no such file, or it has no column `name`.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if "name" not in (reader.fieldnames or ()):
                raise AntherError(
                    f"data.exclude={path} has no column `name` in its first line; analyze.py writes such a list."
                )
            found = [{key: row.get(key) or "" for key in COLUMNS} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        said = getattr(error, "strerror", None) or error
        raise AntherError(
            f"data.exclude={path} cannot be read ({said}); give the CSV that analyze.py wrote."
        ) from error
    return tuple(
        Exclusion(**{key: value if key in NAMES else value.strip() for key, value in row.items()})
        for row in found
        if row["name"].strip()
    )


def write_exclusions(path: Path, exclusions: Iterable[Exclusion]) -> None:
    """Writes a list that `read_exclusions` reads."""
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(asdict(exclusion) for exclusion in exclusions)
