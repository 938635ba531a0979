"""Private PostgreSQL, Redis and RabbitMQ servers for tests and benchmarks.

Each listens on a free port of 127.0.0.1 and keeps its data in a temporary folder. The servers that
happen to run on this machine's default ports are never touched.
"""

from __future__ import annotations

import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import ClassVar, Self

import amqp
import psycopg2
import redis

from tests import install_services

START_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0
LOG_TAIL_CHARS = 5000

# Runs between fork and the server's own program. It gives up root (postgres refuses it), then asks the
# kernel to kill the server with whoever started it: a pytest that dies of kill -9 cleans nothing up.
# The order matters, changing the user clears the request. A program of its own rather than preexec_fn,
# which Python 3.12 warns about in a process with threads.
_TETHER = """
import ctypes, os, sys
parent, uid, gid = map(int, sys.argv[1:4])
if uid != os.getuid():
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() != parent:
    sys.exit("the parent ended before its server began")
os.execvp(sys.argv[4], sys.argv[4:])
"""

# The kernel's "parent" is the thread that forked, not the process: a server restarted by a test's
# helper thread would die with that thread. This one lives as long as the process.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="services")


class ServiceError(RuntimeError):
    """A server did not start or stop; the message carries the end of its log."""


def free_port() -> int:
    """Return a port nobody listens on, outside the range that outgoing connections are given.

    A client that keeps retrying a dead server on a port of that range may be given the very same port
    for its own end, connect to itself, and keep the server from coming back.
    """
    ephemeral_from = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(100):
        port = random.randrange(10_000, max(ephemeral_from, 11_000))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServiceError("found no free port in a hundred tries")


def wait_until(probe: Callable[[], bool], *, limit_s: float, interval_s: float = 0.02) -> bool:
    """Return whether ``probe`` came true within the limit."""
    deadline = time.monotonic() + limit_s
    while not probe():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval_s)
    return True


def _stat(pid: int) -> tuple[str, int] | None:
    """Return state and parent of a process, None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[1])


def _runs(pid: int) -> bool:
    # Where no init reaps, a dead orphan stays a zombie for ever.
    return (stat := _stat(pid)) is not None and stat[0] != "Z"


def _descendants(pid: int) -> list[int]:
    """Return the children of a process and theirs; process groups miss PostgreSQL's, each leads its own."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))):
            children.setdefault(stat[1], []).append(int(entry.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Server(ABC):
    """One server process, with a port and a folder that it keeps over restarts."""

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    not_ready: ClassVar[tuple[type[Exception], ...]]

    def __init__(self) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix=f"positions-{self.name}-"))
        # The server may run as another user, who must reach its data below this folder.
        self.folder.chmod(0o711)
        self.log = self.folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect, with the password in clear."""

    @abstractmethod
    def command(self) -> Sequence[str | Path]:
        """Return what runs the server in the foreground."""

    @abstractmethod
    def connect_once(self) -> None:
        """Open and close a real connection; raise one of ``not_ready`` while that fails."""

    def environment(self) -> Mapping[str, str]:
        return os.environ

    @abstractmethod
    def prepare(self) -> None:
        """Do what must precede each start."""

    @property
    def owner(self) -> tuple[int, int]:
        """User and group the server runs as."""
        return os.getuid(), os.getgid()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServiceError(f"{self.name} is not running")
        return self._process.pid

    def start(self) -> None:
        """Start the server and return once it accepts clients."""
        if self.running:
            raise ServiceError(f"{self.name} is running already")
        self.prepare()
        self._process = self.spawn(self.command())
        if not wait_until(self._accepts, limit_s=START_LIMIT_S):
            self.kill()
            raise self.failure(f"was not ready after {START_LIMIT_S:.0f} s")

    def stop(self) -> None:
        """Ask the server to end and wait until it has."""
        if self._process is None:
            return
        children = _descendants(self.pid)
        self._process.send_signal(self.stop_signal)
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise self.failure(f"did not stop within {STOP_LIMIT_S:.0f} s") from None
        self._process = None
        self._bury(children)

    def kill(self) -> None:
        """Kill the server and all its children with SIGKILL, and wait until they are gone."""
        if self._process is None:
            return
        # A stopped process has no more children while they are counted.
        self._process.send_signal(signal.SIGSTOP)
        children = _descendants(self.pid)
        self._process.kill()
        self._process.wait(STOP_LIMIT_S)
        self._process = None
        self._bury(children)

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop the server and remove its data."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def spawn(self, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        """Run a command that ends with this process, its output appended to the log."""
        tether = [sys.executable, "-ISc", _TETHER, os.getpid(), *self.owner]
        with self.log.open("ab") as log:
            return _spawner.submit(
                subprocess.Popen,
                [str(word) for word in (*tether, *command)],
                cwd=self.folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal is for pytest, which then stops its servers.
                start_new_session=True,
            ).result()

    def failure(self, what: str) -> ServiceError:
        tail = self.log.read_text(errors="replace")[-LOG_TAIL_CHARS:] if self.log.exists() else ""
        return ServiceError(f"{self.name} {what}; its log ends:\n{tail}")

    def _accepts(self) -> bool:
        if not self.running:
            code = self._process.wait() if self._process else None
            self._process = None
            raise self.failure(f"ended while it started (status {code})")
        try:
            self.connect_once()
        except self.not_ready:
            return False
        return True

    def _bury(self, children: Sequence[int]) -> None:
        _kill(children)
        if not wait_until(lambda: not any(map(_runs, children)), limit_s=STOP_LIMIT_S):
            raise self.failure("left children that survive SIGKILL")


class PostgreSQL(Server):
    """PostgreSQL as it runs in production: fsync and synchronous_commit are on."""

    name = "postgres"
    stop_signal = signal.SIGINT  # "fast": open sessions are ended, not waited for
    not_ready = (psycopg2.OperationalError,)

    def __init__(self) -> None:
        super().__init__()
        self.password = secrets.token_hex(16)
        self.data = self.folder / "data"
        self._programs = install_services.postgres_programs()

    @property
    def owner(self) -> tuple[int, int]:
        if os.getuid():
            return super().owner
        for user in ("postgres", "nobody"):
            with suppress(KeyError):
                found = pwd.getpwnam(user)
                return found.pw_uid, found.pw_gid
        raise ServiceError("postgres refuses to run as root, and this machine has no other user to run it")

    @property
    def url(self) -> str:
        return self.database_url("postgres")

    def database_url(self, database: str) -> str:
        return f"postgresql+psycopg2://postgres:{self.password}@127.0.0.1:{self.port}/{database}"

    def prepare(self) -> None:
        if self.data.exists():
            return
        self.data.mkdir(mode=0o700)
        os.chown(self.data, *self.owner)
        password = self.folder / "password"
        password.write_text(self.password)
        password.chmod(0o600)
        os.chown(password, *self.owner)
        initdb = self.spawn([
            self._programs / "initdb",
            # Spares a sync of the empty cluster; what the server commits later is synced.
            "--no-sync",
            "--auth=scram-sha-256",
            "--username=postgres",
            f"--pwfile={password}",
            "--encoding=UTF8",
            "--locale=C",
            f"--pgdata={self.data}",
        ])  # fmt: skip
        try:
            code = initdb.wait(START_LIMIT_S)
        except subprocess.TimeoutExpired:
            initdb.kill()
            code = initdb.wait()
        if code:
            raise self.failure(f"could not create its cluster (initdb: {code})")

    def command(self) -> Sequence[str | Path]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "shared_buffers": "32MB",
            "timezone": "UTC",
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [self._programs / "postgres", "-D", self.data, *options]

    def connect_once(self) -> None:
        with closing(
            psycopg2.connect(
                host="127.0.0.1",
                port=self.port,
                user="postgres",
                password=self.password,
                dbname="postgres",
                connect_timeout=2,
            )
        ):
            pass


class Redis(Server):
    """Redis, or Valkey, as a cache: nothing is kept over a restart."""

    name = "redis"
    not_ready = (redis.ConnectionError, redis.TimeoutError)
    databases = 16

    def __init__(self) -> None:
        super().__init__()
        self.password = secrets.token_hex(16)
        self._program = install_services.redis_program()

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def prepare(self) -> None:
        config = self.folder / "redis.conf"
        config.touch(0o600)  # a password on the command line would be everyone's to read
        config.write_text(
            f"bind 127.0.0.1\nport {self.port}\nrequirepass {self.password}\ndatabases {self.databases}\n"
            f'save ""\nappendonly no\ndir {self.folder}\n'
        )

    def command(self) -> Sequence[str | Path]:
        return [self._program, self.folder / "redis.conf"]

    def connect_once(self) -> None:
        with redis.Redis.from_url(self.url, socket_timeout=2, socket_connect_timeout=2) as client:
            client.ping()


class RabbitMQ(Server):
    """A RabbitMQ node with an Erlang port mapper of its own.

    Args:
        config: More lines of ``rabbitmq.conf``, say ``{"consumer_timeout": "5000"}``.
    """

    name = "rabbitmq"
    not_ready = (OSError, amqp.AMQPError)

    def __init__(self, config: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._config = dict(config or {})
        self._distribution_port = free_port()
        self._epmd_port = free_port()
        self._epmd: subprocess.Popen[bytes] | None = None
        self._programs = install_services.rabbitmq_programs()

    @property
    def url(self) -> str:
        return self.vhost_url("%2F")

    def vhost_url(self, vhost: str) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{vhost}"

    def environment(self) -> Mapping[str, str]:
        folder = str(self.folder)
        foreign = ("RABBITMQ_", "ERL_")
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(foreign)},
            "PATH": f"{self._programs.erlang}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "HOME": folder,
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP_SECONDS": "0",
            "RABBITMQ_NODENAME": "positions@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": f"{folder}/mnesia",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": f"{folder}/pid",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_CONFIG_FILES": f"{folder}/conf.d",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{folder}/advanced.config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            # Makes the script exec Erlang instead of guarding it, so that the process started is the
            # broker itself; -noinput takes back the shell that comes with it.
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-noinput -kernel inet_dist_use_interface {127,0,0,1}",
        }

    def prepare(self) -> None:
        (self.folder / "rabbitmq.conf").write_text(
            "".join(f"{name} = {value}\n" for name, value in self._config.items())
        )
        (self.folder / "enabled_plugins").write_text("[].\n")
        cookie = self.folder / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(secrets.token_hex(16))
            cookie.chmod(0o400)
        # In the foreground and ours: the node would otherwise start a daemon that outlives everything.
        if self._epmd is None or self._epmd.poll() is not None:
            epmd = self._programs.erlang / "epmd"
            self._epmd = self.spawn([epmd, "-port", str(self._epmd_port), "-address", "127.0.0.1"])
            if not wait_until(self._epmd_listens, limit_s=5):
                raise self.failure("has no port mapper (epmd)")

    def command(self) -> Sequence[str | Path]:
        return [self._programs.server]

    def connect_once(self) -> None:
        with amqp.Connection(f"127.0.0.1:{self.port}", connect_timeout=2, read_timeout=10):
            pass

    def close(self) -> None:
        try:
            super().close()
        finally:
            if self._epmd:
                self._epmd.kill()
                self._epmd.wait()

    def evaluate(self, expression: str) -> str:
        """Evaluate an Erlang expression in the node and return its value's text.

        What rabbitmqctl does takes it a second, and this some milliseconds.
        """
        done = subprocess.run(
            [self._programs.erlang / "erl_call", "-n", "positions@localhost", "-e"],
            input=f"{expression}.\n",
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=STOP_LIMIT_S,
            check=False,
        )
        ok, value = "{ok, ", done.stdout.strip()
        if not value.startswith(ok):
            raise self.failure(f"did not evaluate {expression!r}: {value or done.stderr}")
        return value[len(ok) : -1]

    def add_vhost(self, name: str) -> str:
        """Create a virtual host that the default user may do everything in, and return its URL."""
        self.evaluate(
            f'ok = rabbit_vhost:add(<<"{name}">>, <<"tests">>),'
            f'ok = rabbit_auth_backend_internal:set_permissions(<<"guest">>, <<"{name}">>,'
            ' <<".*">>, <<".*">>, <<".*">>, <<"tests">>)'
        )
        return self.vhost_url(name)

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with its queues, and close its connections."""
        self.evaluate(f'rabbit_vhost:delete(<<"{name}">>, <<"tests">>)')

    def _epmd_listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._epmd_port)) == 0
