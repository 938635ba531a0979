"""PostgreSQL and Valkey: their programs, their data, the commands that run them in the foreground.

Of the wheels only the programs are used: their own wrappers add users, change folders above the data's
and lose servers. Both servers listen on 127.0.0.1 only and ask for a password.
"""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import ClassVar, Protocol
from urllib.parse import quote

import psycopg2
import redis
from psycopg2 import sql

from positions.embedded.folder import StartError

INITDB_LIMIT_S = 120


class Server(Protocol):
    """What the supervisor and the start need to know of a server."""

    name: ClassVar[str]
    title: ClassVar[str]
    stop_signal: ClassVar[str]

    @property
    def user(self) -> str | None:
        """Who it runs as; None: as we do."""

    def prepare(self) -> None:
        """Do what must precede each start."""

    def command(self) -> list[str]:
        """Return what runs it in the foreground, without secrets, which ``ps`` would show."""

    def why_not_ready(self) -> str | None:
        """Connect once; return what stood in the way."""


@dataclass(frozen=True, kw_only=True)
class Postgres:
    """A PostgreSQL server that outlives power cuts with every commit it confirmed.

    Args:
        programs: Folder of ``initdb`` and ``postgres``.
        data: Its data, made when absent; ``user`` must be able to reach it.
        user: Who runs it, when we are root, as which it refuses to run.
    """

    programs: Path
    data: Path
    port: int
    password: str
    user: str | None = None

    name: ClassVar[str] = "postgres"
    title: ClassVar[str] = "PostgreSQL"
    stop_signal: ClassVar[str] = "INT"  # "fast": sessions are ended, not waited for

    def url(self, database: str) -> str:
        """URL of a database, with the password in clear."""
        return f"postgresql://postgres:{quote(self.password, '')}@127.0.0.1:{self.port}/{database}"

    def prepare(self) -> None:
        """Make the data folder, all of it or nothing, or check that the one there fits.

        Raises:
            StartError: the data are another release's, or cannot be made.
        """
        if not self.data.exists():
            self._create()
        theirs = (self.data / "PG_VERSION").read_text().strip()
        ours = _output([self.programs / "postgres", "--version"], self.user).split()[-1].partition(".")[0]
        if theirs != ours:
            raise StartError(
                f"{self.data} was made by PostgreSQL {theirs}, and this release brings {ours}: "
                f"dump it with the old release, move it away, start, and restore"
            )
        self._forget_reused_pid()

    def command(self) -> list[str]:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "on",
            "synchronous_commit": "on",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_line_prefix": "%m [%p] %d ",
            # Parallel plans want /dev/shm, of which a container has little.
            "max_parallel_workers_per_gather": 0,
        }
        settings = (f"--{name}={value}" for name, value in options.items())
        # `env -i`: a server has no need of the service's secrets.
        return ["/usr/bin/env", "-i", str(self.programs / "postgres"), "-D", str(self.data), *settings]

    def why_not_ready(self) -> str | None:
        try:
            psycopg2.connect(self.url("postgres"), connect_timeout=2).close()
        except psycopg2.OperationalError as error:
            return str(error).strip()
        return None

    def create_database(self, name: str) -> None:
        """Create a database unless it is there."""
        with closing(psycopg2.connect(self.url("postgres"), connect_timeout=10)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor, suppress(psycopg2.errors.DuplicateDatabase):
                cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))

    def _create(self) -> None:
        prefix = f"{self.data.name}.half-made."
        for left in self.data.parent.glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
        # Never the same name: an initdb that a kill -9 of its parent left alone still writes to its own.
        half_made = Path(tempfile.mkdtemp(prefix=prefix, dir=self.data.parent))
        _give(half_made, self.user)
        password = self.data.with_name(f"{self.data.name}.password")
        _write_private(password, self.password, self.user)
        _output(
            [
                self.programs / "initdb",
                "--auth=scram-sha-256",
                "--username=postgres",
                f"--pwfile={password}",
                "--encoding=UTF8",
                "--locale=C",
                f"--pgdata={half_made}",
            ],
            self.user,
        )
        password.unlink()
        half_made.rename(self.data)
        parent = os.open(self.data.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)

    def _forget_reused_pid(self) -> None:
        # postgres does not start while the process of a stale postmaster.pid seems alive, even if its
        # number now belongs to something else, as it often does in a container that was restarted.
        # Where it is a postgres, or no process, postgres itself knows best.
        lock = self.data / "postmaster.pid"
        with suppress(FileNotFoundError, ValueError, IndexError):
            pid = int(lock.read_text().split()[0])
            if sys.platform == "linux" and Path(f"/proc/{pid}/comm").read_text().strip() != "postgres":
                lock.unlink()


@dataclass(frozen=True, kw_only=True)
class Valkey:
    """A Valkey (or Redis) server, as broker, limiter and cache: at most the last second is lost.

    Args:
        program: ``valkey-server`` or ``redis-server``.
        data: Its data, made when absent; a file named after it holds the configuration.
        user: Who runs it, when we are root.
    """

    program: Path
    data: Path
    port: int
    password: str
    user: str | None = None

    name: ClassVar[str] = "valkey"
    title: ClassVar[str] = "Valkey"
    stop_signal: ClassVar[str] = "TERM"

    def url(self, database: int) -> str:
        """URL of a database, with the password in clear."""
        return f"redis://:{quote(self.password, '')}@127.0.0.1:{self.port}/{database}"

    def prepare(self) -> None:
        self.data.mkdir(mode=0o700, exist_ok=True)
        _give(self.data, self.user)
        config = (
            "bind 127.0.0.1\n"
            f"port {self.port}\n"
            f"requirepass {self.password}\n"
            f'dir "{self.data}"\n'
            'save ""\n'
            "appendonly yes\n"
            "appendfsync everysec\n"
            # Neither a waiting message nor a limit may be dropped to make room: writers are refused.
            "maxmemory 256mb\n"
            "maxmemory-policy noeviction\n"
        )
        _write_private(self._config, config, self.user)

    def command(self) -> list[str]:
        return ["/usr/bin/env", "-i", str(self.program), str(self._config)]

    def why_not_ready(self) -> str | None:
        try:
            with redis.Redis.from_url(self.url(0), socket_timeout=2, socket_connect_timeout=2) as client:
                client.ping()
        except redis.RedisError as error:
            return str(error)
        return None

    @property
    def _config(self) -> Path:
        return self.data.with_name(f"{self.data.name}.conf")


def unprivileged_user() -> str | None:
    """Return who servers run as: nobody else unless we are root.

    Raises:
        StartError: we are root, and there is no other user.
    """
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise StartError("PostgreSQL refuses to run as root, and this machine has no user `nobody` to run it")


def check_reach(folder: Path, user: str | None) -> None:
    """Raise StartError if the user cannot pass through the folder."""
    try:
        _output(["/bin/sh", "-c", 'cd "$0"', folder], user)
    except StartError as error:
        raise StartError(
            f"as root, the servers run as user `{user}`, who cannot pass through {folder} or a folder above "
            f"(POSITION_MANAGER_DATA_DIR names another): {error}"
        ) from None


def programs(package: str, example: str, user: str | None, copies: Path) -> Path:
    """Return the folder of a wheel's programs, copied if the user cannot run them where they are.

    Args:
        package: The wheel's package.
        example: One of its programs, relative to the package; its folder is returned.
        user: Who is to run them.
        copies: Folder for copies.

    Raises:
        StartError: the wheel is not installed, or has no programs for this machine.
    """
    spec = util.find_spec(package)
    if spec is None or spec.origin is None:
        raise StartError(
            f"{package} is not installed: `pip install 'positions[embedded]'`, or name your servers"
        )
    wheel = Path(spec.origin).parent
    found = next(wheel.glob(example), None)
    if found is None:
        raise StartError(f"{package} has no {Path(example).name} for this machine: name a server of your own")
    with suppress(StartError):
        _output([found, "--version"], user)
        return found.parent
    copy = copies / f"{package}-{metadata.version(package)}"
    if not copy.exists():
        shutil.rmtree(copies / package, ignore_errors=True)
        for part in (wheel, wheel.with_name(f"{package}.libs")):
            if part.exists():
                ignored = shutil.ignore_patterns("*.py", "__pycache__", "*.a", "include")
                shutil.copytree(part, copies / package / part.name, ignore=ignored)
        (copies / package).rename(copy)
    return (copy / found.relative_to(wheel.parent)).parent


def _give(path: Path, user: str | None) -> None:
    if user:
        entry = pwd.getpwnam(user)
        os.chown(path, entry.pw_uid, entry.pw_gid)


def _write_private(path: Path, text: str, user: str | None) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)
    _give(path, user)


def _output(command: list[str | Path], user: str | None) -> str:
    entry = pwd.getpwnam(user) if user else None
    try:
        done = subprocess.run(  # noqa: S603 - the words are ours
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            user=entry and entry.pw_uid,
            group=entry and entry.pw_gid,
            extra_groups=[] if entry else None,
            capture_output=True,
            text=True,
            cwd="/",
            env={"PATH": os.defpath},
            timeout=INITDB_LIMIT_S,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise StartError(f"{command[0]} failed: {(error.stderr or error.stdout).strip()}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StartError(f"{command[0]} failed: {error}") from None
    return done.stdout
