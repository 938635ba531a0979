"""Private PostgreSQL, Redis and RabbitMQ servers for tests and benchmarks.

Each listens on a free port of 127.0.0.1 and keeps its data in a temporary folder. The servers that
happen to run on this machine's default ports are never touched.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Self

import amqp

from positions.embedded import servers
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


class Port:
    """A free port of 127.0.0.1, kept for its server while that is down.

    It is outside the range that outgoing connections are given: a client that keeps retrying a dead server
    there may be given the very same port for its own end, connect to itself, and keep the server out.
    """

    def __init__(self) -> None:
        ephemeral_from = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        self._socket = socket.socket()
        for _ in range(100):
            # Not from random, which hypothesis seeds the same in every run.
            self.number = 10_000 + secrets.randbelow(max(ephemeral_from - 10_000, 1000))
            with suppress(OSError):
                self._socket.bind(("127.0.0.1", self.number))
                # From now on the bound socket keeps out all but those who set this too, as servers do.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                return
        self._socket.close()
        raise ServiceError("found no free port in a hundred tries")

    def close(self) -> None:
        self._socket.close()


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


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class Server(ABC):
    """One server process, with a port and a folder that it keeps over restarts."""

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(self) -> None:
        self._ports = ExitStack()
        self.port = self.reserve_port()
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
    def why_not_ready(self) -> str | None:
        """Connect once, as a client would; return what stood in the way."""

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
            reason = self.why_not_ready()
            self.kill()
            raise self.failure(f"was not ready after {START_LIMIT_S:.0f} s ({reason})")

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

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let the server and its children stand still: the kernel accepts for them, and nobody answers."""
        tree = [self.pid, *_descendants(self.pid)]
        _signal(tree, signal.SIGSTOP)
        try:
            # What was forked while they were being stopped.
            late = [pid for pid in _descendants(self.pid) if pid not in tree]
            _signal(late, signal.SIGSTOP)
            tree += late
            yield
        finally:
            _signal(tree, signal.SIGCONT)

    def close(self) -> None:
        """Stop the server and remove its data."""
        try:
            self.stop()
        finally:
            self._ports.close()
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

    def reserve_port(self) -> int:
        return self._ports.enter_context(closing(Port())).number

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
        return self.why_not_ready() is None

    def _bury(self, children: Sequence[int]) -> None:
        _signal(children, signal.SIGKILL)
        if not wait_until(lambda: not any(map(_runs, children)), limit_s=STOP_LIMIT_S):
            raise self.failure("left children that survive SIGKILL")


class PostgreSQL(Server):
    """The embedded default's PostgreSQL, which syncs every commit, run from the machine's programs."""

    name = "postgres"
    stop_signal = signal.SIGINT  # "fast": open sessions are ended, not waited for

    def __init__(self) -> None:
        super().__init__()
        self._user = servers.unprivileged_user()
        self._server = servers.Postgres(
            programs=install_services.postgres_programs(self._user, self.folder),
            data=self.folder / "data",
            port=self.port,
            password=secrets.token_hex(16),
            user=self._user,
        )

    @property
    def owner(self) -> tuple[int, int]:
        if not self._user:
            return super().owner
        entry = pwd.getpwnam(self._user)
        return entry.pw_uid, entry.pw_gid

    @property
    def url(self) -> str:
        # SQLAlchemy 2.1 takes a URL without a driver for psycopg 3.
        return self._server.url("postgres").replace("postgresql://", "postgresql+psycopg2://")

    def prepare(self) -> None:
        self._server.prepare()

    def command(self) -> Sequence[str | Path]:
        return self._server.command()

    def why_not_ready(self) -> str | None:
        return self._server.why_not_ready()


class Redis(Server):
    """The embedded default's Valkey, run from the machine's programs (or Redis's)."""

    name = "redis"
    for_each_test = 14
    """Databases that tests have in turn. The two above these are each a file's own, so that nothing which a
    test left a minute ago, say how many wrong keys came from here, counts there."""

    def __init__(self) -> None:
        program = install_services.redis_program()
        super().__init__()
        self._server = servers.Valkey(
            program=program,
            data=self.folder / "data",
            port=self.port,
            password=secrets.token_hex(16),
        )

    @property
    def url(self) -> str:
        return self.database_url(0)

    def database_url(self, number: int) -> str:
        return self._server.url(number)

    def prepare(self) -> None:
        self._server.prepare()

    def command(self) -> Sequence[str | Path]:
        return self._server.command()

    def why_not_ready(self) -> str | None:
        return self._server.why_not_ready()


class RabbitMQ(Server):
    """A RabbitMQ node with an Erlang port mapper of its own.

    Args:
        config: More lines of ``rabbitmq.conf``, say ``{"consumer_timeout": "5000"}``.
    """

    name = "rabbitmq"

    def __init__(self, config: Mapping[str, str] | None = None) -> None:
        self._programs = install_services.rabbitmq_programs()
        super().__init__()
        self._config = dict(config or {})
        self._distribution_port = self.reserve_port()
        self._epmd_port = self.reserve_port()
        self._epmd: subprocess.Popen[bytes] | None = None

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

    def why_not_ready(self) -> str | None:
        try:
            with amqp.Connection(f"127.0.0.1:{self.port}", connect_timeout=2, read_timeout=10):
                return None
        except (OSError, amqp.AMQPError) as error:
            return str(error)

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

        def call() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [self._programs.erlang / "erl_call", "-n", "positions@localhost", "-e"],
                input=f"{expression}.\n",
                env=self.environment(),
                capture_output=True,
                text=True,
                timeout=STOP_LIMIT_S,
                check=False,
            )

        done = call()
        # It is impatient with a node on a busy machine. Nothing was evaluated then.
        for _ in range(5):
            if "failed to connect" not in done.stderr:
                break
            time.sleep(0.5)
            done = call()
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
        self.sync_definitions()
        return self.vhost_url(name)

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with its queues, and close its connections."""
        self.evaluate(f'rabbit_vhost:delete(<<"{name}">>, <<"tests">>)')

    def sync_definitions(self) -> None:
        """Bring vhosts, queues and bindings to disk, as they would be after two seconds.

        RabbitMQ confirms a message when it is on disk, but a declaration before: a kill -9 may forget a
        durable queue that was just declared, with the confirmed messages in it.
        """
        self.evaluate("mnesia:sync_log()")

    def _epmd_listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._epmd_port)) == 0
