"""From the folder of a run to a dataset repository on the Hugging Face hub."""

import json
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diffusion.curation import card, records
from diffusion.curation.export import DATASET, IMAGEFOLDER
from diffusion.differences import differences
from diffusion.errors import AntherError
from diffusion.evaluation.report import document, public, read_metrics
from diffusion.files import atomic

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd

PUBLISHED = "published.json"
METRICS = "metrics.json"

LARGE_BYTES = 10**9
LARGE_FILES = 5_000
FILES_PER_COMMIT = 500
"""Above either size a publication is a row of commits: the hub may answer a commit of thousands of files too late
(504), and what a broken line costs is one commit. The client (2.4) has no `upload_large_folder` any more; its
`upload_folder` splits commits too, but only with Xet."""

ATTEMPTS = 5
LONGEST_WAIT = 300
"""Seconds: the window in which the hub counts requests. A longer Retry-After is told to the user instead."""

BESIDE = ("metrics.csv", "records.parquet", "embeddings.npy")

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One file to send.

    Attributes:
        path: in the repository.
        content: a file of the run, or bytes that exist only in the publication.
    """

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def operation(self) -> "CommitOperationAdd":
        """For the hub's client, which reads the file where it lies."""
        from huggingface_hub import CommitOperationAdd

        return CommitOperationAdd(self.path, self.content)


def publish(
    folder: Path | str,
    repo_id: str,
    *,
    dry_run: bool = True,
    private: bool = True,
    title: str | None = None,
    licence: str = "unknown",
    endpoint: str | None = None,
    command: str | None = None,
) -> str | None:
    """Sends a run to a dataset repository, or lists what would be sent.

    The token comes from where the hub's client looks: `HF_TOKEN` or the file that `hf auth login` writes. The same call
    after a failure goes on: the hub keeps contents that arrived, and unchanged files are in no further commit.
    A finished publication is written to `published.json` in the folder.

    Args:
        folder: of the run, with its exports `dataset/` (FiftyOneDataset) and `imagefolder/`.
        repo_id: "namespace/name".
        dry_run: only list; needs neither a token nor the network.
        private: whether the repository is created private; a public one is refused then. One that exists and is private
            stays so, whatever is asked for.
        title: of the card; the name of the repository by default.
        licence: of the images: an identifier of the hub, or words.
        endpoint: of the hub; the client's own (`HF_ENDPOINT`) by default.
        command: what sends the run, for the dry run to print; a call of this function by default.

    Returns:
        The address of the repository, or None after a dry run.

    Raises:
        AntherError: a wrong name, a missing file, no token, no right to write, or a hub that could not be reached.
    """
    folder, title = Path(folder), title if title is not None else repo_id.rpartition("/")[2]
    check(repo_id, dry_run)
    items = list(contents(folder, repo_id, title, licence))
    total = sum(item.size for item in items)
    kind = "private" if private else "public"
    if dry_run:
        for item in items:
            print(f"{item.size:>12,}  {item.path}")
        print(f"{len(items):,} files, {total:,} bytes would be sent to the {kind} dataset repository {repo_id}.")
        chosen = {"dry_run": False, "private": private, "title": title, "licence": licence, "endpoint": endpoint}
        words = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
        code = (
            f"from diffusion.curation.publish import publish; publish({str(folder.resolve())!r}, {repo_id!r}, {words})"
        )
        print(f"This was a dry run: nothing was sent. To send it: {command or shlex.join(['python', '-c', code])}")
        return None
    print(f"{len(items):,} files, {total:,} bytes go to the {kind} dataset repository {repo_id}.", flush=True)
    sender = _Sender(repo_id, endpoint)
    commit, private = sender.send(items, total, private)
    url = sender.url
    record = {"repo": repo_id, "url": url, "commit": commit, "private": private, "files": len(items), "bytes": total}
    with atomic(folder / PUBLISHED) as temporary:
        temporary.write_text(json.dumps(record | {"time": datetime.now(UTC).isoformat()}, indent=2) + "\n")
    print(f"published: {url}")
    return url


def contents(folder: Path, repo_id: str, title: str, licence: str) -> Iterator[Item]:
    """What is sent, in this order: the card, its picture, metrics and records, plots, and the export as `test/`.

    Images are sent once: `datasets` reads those of the export by the metadata of the run's image folder.

    Raises:
        AntherError: a file of the run or of its export is missing.
    """
    import io

    frame = records.read(folder)
    readme = card.card(folder, repo_id, title, licence)
    export, metadata = folder / DATASET, folder / IMAGEFOLDER / "test" / "metadata.parquet"
    for path in (export / "samples.json", metadata):
        if not path.is_file():
            raise AntherError(
                f"there is no {path}, which belongs to a publication: run evaluate.py again with this hydra.run.dir to "
                "make it."
            )
    absent = [name for name in frame["file"] if not (export / "data" / Path(name).name).is_file()]
    if absent:
        raise AntherError(
            f"{len(absent)} of {len(frame)} images are not in {export / 'data'} (first: {Path(absent[0]).name}): "
            f"delete {export} and run evaluate.py again with this hydra.run.dir to export it anew."
        )
    picture = io.BytesIO()
    card.preview(folder).save(picture, format="PNG")
    yield Item("README.md", readme.encode())
    yield Item(card.PREVIEW, picture.getvalue())
    run, results = read_metrics(folder)
    yield Item(METRICS, document(public(run), results).encode())
    for name in BESIDE:
        if (folder / name).is_file():
            yield Item(name, folder / name)
    for path in _files(folder / "plots"):
        yield Item(f"plots/{path.relative_to(folder / 'plots').as_posix()}", path)
    for path in _files(export):
        yield Item(f"test/{path.relative_to(export).as_posix()}", path)
    yield Item(f"test/data/{metadata.name}", metadata)


def _files(folder: Path) -> list[Path]:
    """Every file below a folder but hidden ones, which are temporary."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def check(repo_id: str, dry_run: bool = True) -> None:
    """Whether a publication can begin at all: a look before hours of work, without the network.

    Raises:
        AntherError: no "namespace/name", or no token although something is to be sent.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    reason = None if "/" in repo_id else "the namespace is missing"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error).rstrip(".")
    if reason is not None:
        raise AntherError(f"publish.repo_id={repo_id!r} is no name of a repository ({reason}): write namespace/name.")
    if not dry_run:
        _token()


def _token() -> str:
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise AntherError("HF_HUB_OFFLINE is set, so nothing was sent: unset it to publish.")
    token = get_token()
    if not token:
        raise AntherError(
            "no token of the hub was found, so nothing was sent: log in with `hf auth login`, or set HF_TOKEN to a "
            "token with the right to write, and run the same command again."
        )
    return token


class _Sender:
    """One publication: a token, a repository, and what has been sent so far."""

    def __init__(self, repo_id: str, endpoint: str | None):
        from huggingface_hub import HfApi

        self.token = _token()
        self.repo_id = repo_id
        self.api = HfApi(endpoint=endpoint, token=self.token)
        self.url = f"{self.api.endpoint}/datasets/{repo_id}"
        self.sent = "nothing was sent"

    def send(self, items: list[Item], total: int, private: bool) -> tuple[str, bool]:
        """Creates the repository and sends the files; returns the last commit, and whether it is private there."""
        repo: dict[str, Any] = {"repo_id": self.repo_id, "repo_type": "dataset"}
        self._try("create the repository", lambda: self.api.create_repo(**repo, private=private, exist_ok=True))
        info = self._try("look at the repository", lambda: self.api.dataset_info(self.repo_id))
        if private and not info.private:
            raise AntherError(
                f"{self.url} exists and is public, but a private one was asked for, so nothing was sent: choose "
                "another publish.repo_id or set publish.private=false."
            )
        if info.private and not private:
            print(f"{self.url} exists and is private and stays so: make it public in its settings there.", flush=True)
        there = self._try("look at the repository", lambda: self.api.list_repo_files(**repo))
        ours = {item.path for item in items}
        if foreign := [path for path in there if path.startswith("test/") and path not in ours]:
            raise AntherError(
                f"{self.url} holds {len(foreign)} files in test/ that this run does not have (first: {foreign[0]}), so "
                "nothing was sent: choose another publish.repo_id or delete them on the hub."
            )
        if METRICS in there:
            self._name_other_run(next(item.content for item in items if item.path == METRICS))
        large = total > LARGE_BYTES or len(items) > LARGE_FILES
        step = FILES_PER_COMMIT if large else len(items)
        batches = [items[k : k + step] for k in range(0, len(items), step)]
        print(
            f"above {LARGE_FILES:,} files or {LARGE_BYTES:,} bytes: {len(batches)} commits of up to {step:,} files"
            if large
            else "one commit",
            flush=True,
        )
        done, self.sent = 0, f"0 of {len(items):,} files are committed"
        for k, batch in enumerate(batches):
            message = "Publish the evaluation" + (f", part {k + 1} of {len(batches)}" if large else "")
            commit = self._try(f"send commit {k + 1} of {len(batches)}", partial(self._commit, repo, batch, message))
            done += len(batch)
            self.sent = f"{done:,} of {len(items):,} files are committed"
            print(self.sent, flush=True)
        return commit.oid, bool(info.private)

    def _name_other_run(self, ours: Path | bytes) -> None:
        """Says in what the run that lies in the repository differs from the one that comes in its place, if it does."""
        with tempfile.TemporaryDirectory() as folder:
            fetch = partial(self.api.hf_hub_download, self.repo_id, METRICS, repo_type="dataset", local_dir=folder)
            theirs = Path(self._try(f"look at the repository's {METRICS}", fetch)).read_bytes()
        assert isinstance(ours, bytes)
        if found := differences(_settings(theirs), _settings(ours)):
            print(f"{self.url} holds another run, which this one replaces: {found}.", flush=True)

    def _commit(self, repo: dict[str, Any], batch: list[Item], message: str) -> "CommitInfo":
        # New operations for every attempt: the client asks the hub again what is there, so that a commit whose answer
        # was lost is not made twice.
        operations = [item.operation() for item in batch]
        commit: CommitInfo = self.api.create_commit(**repo, operations=operations, commit_message=message)
        return commit

    def _try(self, what: str, call: Callable[[], T]) -> T:
        """Calls the hub, again after what passes by itself: 408, 429, 5xx and broken connections."""
        attempt = 1
        while True:
            try:
                return call()
            except Exception as error:
                fault = _Fault.of(error)
                if fault is None:
                    raise
            # Outside the except: the client's exceptions quote what the hub says, and must not be chained to ours.
            reason = self._clean(fault.reason)
            if not fault.passes:
                raise AntherError(self._refusal(what, fault.status, reason))
            wait = min(2.0**attempt, 60.0) if fault.wait is None else fault.wait
            if attempt == ATTEMPTS or wait > LONGEST_WAIT:
                asked = f"; the hub asks to wait {wait:.0f} s" if wait > LONGEST_WAIT else ""
                raise AntherError(
                    f"could not {what} in {attempt} attempts ({reason}{asked}); {self.sent}, and contents that arrived "
                    "are kept: run the same command again, it sends what is missing."
                )
            attempt += 1
            print(f"could not {what} ({reason}): attempt {attempt} of {ATTEMPTS} in {wait:.0f} s", flush=True)
            time.sleep(wait)

    def _refusal(self, what: str, status: int | None, reason: str) -> str:
        if status in (401, 403):
            return (
                f"the hub does not let this token {what} ({reason}); {self.sent}: make a token with the right to write "
                f"to {self.repo_id} at {self.api.endpoint}/settings/tokens, log in with `hf auth login` or set "
                "HF_TOKEN, and run the same command again."
            )
        return f"could not {what} ({reason}); {self.sent}: mend the cause and run the same command again."

    def _clean(self, words: str) -> str:
        return " ".join(words.replace(self.token, "[token]").split())[:300].rstrip(". ")


@dataclass(frozen=True)
class _Fault:
    """What went wrong between the client and the hub.

    Attributes:
        reason: in words, of whoever noticed.
        status: of HTTP, where an answer came.
        passes: whether another attempt may succeed.
        wait: seconds until then, if the hub named them.
    """

    reason: str
    status: int | None = None
    passes: bool = False
    wait: float | None = None

    @staticmethod
    def of(error: Exception) -> "_Fault | None":
        """Reads an exception of the client; None for one that is not about the hub."""
        from huggingface_hub.errors import HfHubHTTPError

        # The client wraps what happens in its threads.
        chain: list[BaseException] = [error]
        while (inner := chain[-1].__cause__) is not None and inner not in chain:
            chain.append(inner)
        for cause in chain:
            if isinstance(cause, HfHubHTTPError):
                status = cause.response.status_code
                reason = f"HTTP status {status}" + (f": {cause.server_message}" if cause.server_message else "")
                return _Fault(
                    reason, status, status in (408, 429) or status >= 500, _retry_after(cause.response.headers)
                )
        last = chain[-1]
        reason = str(last) or type(last).__name__
        if isinstance(last, OSError) and last.filename is not None:
            return _Fault(f"{last.filename}: {last.strerror}")
        if isinstance(last, json.JSONDecodeError):
            return _Fault("what came was not JSON", passes=True)  # a gateway's page in place of the hub's answer
        if isinstance(last, ValueError):
            return _Fault(reason)
        # Of the libraries below the client; Xet's are RuntimeErrors.
        below = type(last).__module__.startswith(("httpx", "httpcore", "hf_xet"))
        return _Fault(reason, passes=True) if below or isinstance(last, OSError | RuntimeError) else None


def _settings(metrics: bytes) -> dict[str, Any]:
    """What a `metrics.json` says of its run but when and where it was made; nothing if it is not one of ours."""
    try:
        run = dict(json.loads(metrics)["run"])
    except (ValueError, KeyError, TypeError):
        return {}
    return {key: value for key, value in run.items() if key not in ("made", "seconds", "versions")}


def _retry_after(headers: Any) -> float | None:
    """Seconds that the hub asks for: Retry-After in seconds or as a date, or its own rate limit header."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        limit = parse_ratelimit_headers(headers)
        return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None
