"""FiftyOne's database: started, shared, or one sentence that says why not."""

import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from diffusion.curation import database
from diffusion.errors import AntherError

SECRET = "pa55word"


@pytest.fixture
def own_start(monkeypatch):
    """Leaves the session's database as it is after a test that starts another one."""
    monkeypatch.setattr(database, "_service", database._service)
    monkeypatch.setenv("FIFTYONE_PRIVATE_DATABASE_PORT", os.environ["FIFTYONE_PRIVATE_DATABASE_PORT"])


def folder_on(port):
    from pymongo import MongoClient

    with MongoClient(port=int(port)) as client:
        return Path(client.admin.command("getCmdLineOpts")["parsed"]["storage"]["dbPath"])


def test_database_is_in_the_folder_that_was_asked_for(fiftyone):
    assert folder_on(os.environ["FIFTYONE_PRIVATE_DATABASE_PORT"]) == Path(os.environ["FIFTYONE_DATABASE_DIR"])
    assert not fiftyone.config.show_progress_bars
    assert fiftyone.config.do_not_track
    assert database.ready() is fiftyone


@pytest.mark.slow
def test_shares_a_database_on_the_same_folder_only(fiftyone, own_start, tmp_path, monkeypatch):
    first = os.environ["FIFTYONE_PRIVATE_DATABASE_PORT"]
    database._start(Path(fiftyone.config.database_dir))
    assert os.environ["FIFTYONE_PRIVATE_DATABASE_PORT"] == first
    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", str(tmp_path / "other"))
    database._start(tmp_path / "other")
    assert os.environ["FIFTYONE_PRIVATE_DATABASE_PORT"] != first
    assert folder_on(os.environ["FIFTYONE_PRIVATE_DATABASE_PORT"]) == tmp_path / "other"


def check_sentence(error, *parts):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith("stay in the run's folder.")
    for part in parts:
        assert part in text, text


@pytest.mark.slow
def test_a_locked_folder_is_named_with_the_reason(fiftyone, own_start, tmp_path, monkeypatch, capfd):
    import fiftyone.core.service as fos

    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", str(tmp_path))
    command = [fos.DatabaseService.find_mongod(), "--dbpath", str(tmp_path), "--port", "0", "--nounixsocket"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        for line in other.stdout:
            if "Waiting for connections" in line:
                break
        try:
            with pytest.raises(AntherError) as error:
                database._start(tmp_path)
        finally:
            other.terminate()
            other.stdout.read()
    check_sentence(error, str(tmp_path), "Another mongod instance", "FIFTYONE_DATABASE_URI")
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_cannot_be_written(fiftyone, own_start, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", str(tmp_path / "file" / "db"))
    with pytest.raises(AntherError) as error:
        database._start(tmp_path / "file" / "db")
    check_sentence(error, str(tmp_path / "file" / "db"), "choose a folder that can be written")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "no mongod"),
        (b"\x7fELF of another machine", "Exec format error"),
        (b"#!/bin/sh\necho 'mongod: libssl.so.3: cannot open shared object file' >&2; exit 127", "libssl.so.3"),
        (b"#!/bin/sh\nkill -ILL $$", "AVX"),
    ],
)
def test_a_mongod_that_is_missing_or_cannot_run(fiftyone, own_start, tmp_path, monkeypatch, content, part):
    import fiftyone.constants as foc

    monkeypatch.setattr(foc, "FIFTYONE_DB_BIN_DIR", str(tmp_path))
    if content is not None:
        (tmp_path / "mongod").write_bytes(content)
        (tmp_path / "mongod").chmod(0o755)
    with pytest.raises(AntherError) as error:
        database._start(tmp_path / "db")
    check_sentence(error, part, "FIFTYONE_DATABASE_URI")


def test_a_missing_mongod_is_brought_by_the_wheel_of_the_project(fiftyone, own_start, tmp_path, monkeypatch):
    """By the pin of pyproject.toml, in a way that does not depend on what pip believes to be installed."""
    import fiftyone.constants as foc

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    (wheel,) = (line.partition(";")[0].strip() for line in project["optional-dependencies"]["offline"])
    monkeypatch.setattr(foc, "FIFTYONE_DB_BIN_DIR", str(tmp_path))
    with pytest.raises(AntherError) as error:
        database._start(tmp_path / "db")
    check_sentence(error, f"pip install --force-reinstall --no-deps {wheel} ", "fastdl.mongodb.org", "--no-cache-dir")


def test_says_how_to_install_fiftyone(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "fiftyone"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(AntherError) as error:
        database.ready.__wrapped__()
    check_sentence(error, "FiftyOne is not installed", "run pip install -e '.[eval,offline]' in the clone")


@pytest.mark.parametrize(
    ("uri", "host"),
    [
        (f"mongodb://ann:{SECRET}@db.example:27018/x?tls=true", "db.example:27018"),
        (f"mongodb+srv://ann:{SECRET}@db.example/", "db.example"),
        (f"mongodb://ann:{SECRET}@a.example:1,b.example:2", "a.example:1,b.example:2"),
        (f"mongodb://ann:x/{SECRET}@db.example", "db.example"),
        (f"mongodb://ann:x@{SECRET}@db.example", "db.example"),
        (f"mongodb://ann:x?{SECRET}@db.example", "an unreadable address"),
        (f"mongodb://db.example/?tlsCertificateKeyFilePassword=x@{SECRET}", "an unreadable address"),
        (f"mongodb://ann:{SECRET}", "an unreadable address"),
        ("mongodb://db.example", "db.example"),
    ],
)
def test_host_of_a_uri_without_its_password(uri, host):
    assert database._host(uri) == host


def test_a_server_that_asks_for_a_password(fiftyone, tmp_path):
    """A real mongod that wants a login; the password must not be in the message or in its causes."""
    import fiftyone.core.service as fos
    from pymongo import MongoClient

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [fos.DatabaseService.find_mongod(), "--auth", "--dbpath", str(tmp_path), "--port", str(port)]
    with subprocess.Popen([*command, "--nounixsocket"], stdout=subprocess.DEVNULL) as server:
        try:
            with MongoClient(port=port) as client:
                client.admin.command("createUser", "ann", pwd=SECRET, roles=["root"])
            database._reach(f"mongodb://ann:{SECRET}@localhost:{port}")
            with pytest.raises(AntherError) as error:
                database._reach(f"mongodb://ann:{SECRET}1@localhost:{port}")
        finally:
            server.terminate()
    check_sentence(error, f"localhost:{port}", "check its user and password")
    assert SECRET not in str(error.value)
    assert error.value.__suppress_context__


def test_a_uri_that_nothing_answers(monkeypatch):
    monkeypatch.setattr(database, "URI_SECONDS", 0.2)
    for uri, part in (
        (f"mongodb://ann:{SECRET}@localhost:1", "localhost:1"),
        (f"mongodb://ann:{SECRET}%@localhost:1", "%XX"),
        (f"postgres://ann:{SECRET}@localhost:1", "write it as mongodb://"),
    ):
        with pytest.raises(AntherError) as error:
            database._reach(uri)
        check_sentence(error, part, "FIFTYONE_DATABASE_URI")
        assert SECRET not in str(error.value)


def run(tmp_path, *arguments, **environment):
    env = {key: value for key, value in os.environ.items() if not key.startswith("FIFTYONE_")}
    env |= {"FIFTYONE_DATABASE_DIR": str(tmp_path / "db"), "FIFTYONE_CONFIG_PATH": str(tmp_path / "config.json")}
    return subprocess.run(
        [sys.executable, *arguments], env=env | environment, capture_output=True, text=True, timeout=300
    )


def test_a_command_ends_with_one_sentence(make_run, tmp_path):
    """As a person sees it, in a process of its own: no trace, no banner, no password."""
    folder = make_run(tmp_path / "run", n=2)
    uri = f"mongodb://ann:{SECRET}@localhost:1"
    result = run(tmp_path, "-m", "diffusion.curation.gather", str(folder), "--name", "x", FIFTYONE_DATABASE_URI=uri)
    assert result.returncode == 1
    assert result.stderr.startswith("error: the database of FIFTYONE_DATABASE_URI at localhost:1 cannot be reached")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert SECRET not in result.stderr


@pytest.mark.slow
def test_a_quiet_start(make_run, tmp_path):
    """A dataset from nothing to the database, in a process of its own: nothing printed but what was asked for."""
    folder = make_run(tmp_path / "run")
    result = run(tmp_path, "-m", "diffusion.curation.gather", str(folder), "--name", "x")
    assert result.stderr == ""
    assert result.stdout.splitlines() == ["dataset 'x' is made; look at it: python -m diffusion.curation.app 'x'"]
    code = "from diffusion.curation import database; print(database.ready().list_datasets())"
    assert run(tmp_path, "-c", code).stdout == "['x']\n"


@pytest.mark.slow
def test_a_database_that_is_killed_loses_nothing_and_the_same_command_goes_on(make_run, tmp_path):
    folder = make_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code = """
import sys
from pathlib import Path
from diffusion import cli
from diffusion.evaluation.run import _curate

def curate():
    if sys.argv[2] == "kill":
        import psutil
        from diffusion.curation import database
        database.ready()
        import fiftyone.brain as fob
        def kill(*args, **kwargs):
            (mongod,) = [p for p in psutil.Process().children(recursive=True) if p.name() == "mongod"]
            mongod.kill()
            psutil.wait_procs([mongod], timeout=10)
            return whole(*args, **kwargs)
        whole, fob.compute_uniqueness = fob.compute_uniqueness, kill
    _curate("x", Path(sys.argv[1]))

cli.run(curate)
"""
    killed = run(tmp_path, "-c", code, str(folder), "kill")
    assert killed.returncode == 1, killed.stderr
    (said,) = [line for line in killed.stderr.splitlines() if line.startswith("error: ")]
    assert said.startswith("error: FiftyOne's database ended while it was used.")
    assert "run the same command again" in said
    assert "Traceback" not in killed.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    again = run(tmp_path, "-c", code, str(folder), "whole")
    assert again.returncode == 0, again.stderr
    assert (folder / "dataset" / "samples.json").exists()
    code = "from diffusion.curation import database; print(database.ready().list_datasets())"
    assert run(tmp_path, "-c", code).stdout == "['x']\n"
