"""FiftyOne's App on the dataset of a run.

python -m diffusion.curation.app RUN_FOLDER [--port N]
"""

import argparse
import os
import shlex
import socket
import sys
import webbrowser
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from diffusion import cli
from diffusion.curation import database
from diffusion.curation.dataset import build_dataset, own_name
from diffusion.curation.export import exported_name, load_exported
from diffusion.errors import AntherError


def open_app(folder: Path | str, port: int = 5151, wait: bool = True) -> Any:
    """Opens the App on the dataset of a run and prints its address.

    Where the database does not have the run's dataset, it is loaded from the export, and built from the run's files
    where there is no export. A browser is opened if this machine has a screen. The App listens on this machine only;
    FIFTYONE_DEFAULT_APP_ADDRESS (such as 0.0.0.0) opens it to others.

    Args:
        folder: of a run of evaluate.py, or the name of a dataset of the database.
        port: of the App.
        wait: until Ctrl-C is pressed; else the App lives as long as the session that is returned.

    Returns:
        FiftyOne's session.

    Raises:
        AntherError: there is no such run, the port is taken, or there is no database.
    """
    if not Path(folder).is_dir() and Path(folder).name != str(folder):
        raise AntherError(f"there is no folder {folder}: give the folder of a run of evaluate.py.")
    elsewhere = f"`{shlex.join(['python', '-m', 'diffusion.curation.app', str(folder)])} --port N`"
    _check_port(port, elsewhere)
    fo = database.ready()
    dataset = fo.load_dataset(dataset_of(folder))
    from fiftyone.core.service import ServiceListenTimeout

    try:
        with redirect_stdout(StringIO()):  # while the server starts, FiftyOne prints that it cannot be reached yet
            # Named, for in a container FiftyOne would take every address, and the App asks nobody for a password.
            address = fo.config.default_app_address
            session = fo.launch_app(dataset, port=port, address=address, remote=not has_browser())
    except ServiceListenTimeout as error:
        raise AntherError(
            f"FiftyOne's App does not start on port {port} within a minute: try another one with {elsewhere}."
        ) from error
    # The page of the dataset itself: the bare address shows it only to who comes after the session is connected.
    page = f"http://localhost:{port}/datasets/{dataset.slug}"
    print(f"FiftyOne's App shows {dataset.name!r} at {page}" + _hint(port), flush=True)
    if wait:
        try:
            session.wait(-1)
        except KeyboardInterrupt:
            session.close()
    return session


def dataset_of(folder: Path | str) -> str:
    """The name of the dataset of a run in the database, which it is brought into if need be.

    Args:
        folder: of the run, or the name of a dataset.

    Raises:
        AntherError: there is neither.
    """
    fo = database.ready()
    if not Path(folder).is_dir():
        if fo.dataset_exists(str(folder)):
            return str(folder)
        raise AntherError(f"{folder} is neither a folder nor a dataset of the database: give the folder of a run.")
    run = Path(folder).resolve()
    name = exported_name(run)
    if name is None:
        name, bring = run.name, build_dataset
    else:
        bring = load_exported
    name = own_name(name, run)
    return name if fo.dataset_exists(name) else bring(run, name)


def has_browser() -> bool:
    """Whether a browser would open on a screen before the user; a text browser would take the terminal."""
    if "SSH_CONNECTION" in os.environ:
        return False
    if sys.platform == "linux" and not os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}:
        return False
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True


def _check_port(port: int, elsewhere: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left is free
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise AntherError(
                f"port {port} is taken, perhaps by another App: close that, or choose another one with {elsewhere}."
            ) from error


def _hint(port: int) -> str:
    if has_browser():
        return "; Ctrl-C ends it."
    return f"; from another machine: ssh -N -L {port}:127.0.0.1:{port} <this machine>. Ctrl-C ends it."


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusion.curation.app", description="Opens FiftyOne's App on the dataset of a run."
    )
    parser.add_argument("folder", metavar="RUN_FOLDER", help="folder of a run of evaluate.py, or a dataset's name")
    parser.add_argument("--port", type=int, default=5151, help="of the App (5151)")
    options = parser.parse_args(arguments)
    open_app(options.folder, options.port)


if __name__ == "__main__":
    cli.run(main)
