"""supervisord: what it is told to run, and how it is asked."""

import http.client
import shlex
import socket
import xmlrpc.client
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# More than Linux (108) and macOS (104) allow a socket's path would fail in a way hard to understand.
SOCKET_PATH_LIMIT_CHARS = 100

# A program that ends sooner has failed to start: supervisord waits a second longer after each such failure,
# and gives the program up (state FATAL) after the last. Celery takes some seconds to find what is wrong.
START_S = 10
START_RETRIES = 3


@dataclass(frozen=True, kw_only=True)
class Program:
    """One supervised program.

    Args:
        group: Programs of one group start and stop together; see :func:`config`.
        stop_s: How long it may take to stop before it is killed.
    """

    name: str
    group: str
    command: Sequence[str]
    stop_signal: str = "TERM"
    stop_s: int = 10


def config(
    programs: Sequence[Program],
    *,
    groups: Sequence[str],
    path: Path,
    logs: Path,
    directory: Path,
    user: str | None,
) -> str:
    """Return supervisord's configuration.

    Only the first group starts by itself. When supervisord stops, it stops the last group first, and the
    next only when that has ended.

    Args:
        programs: What it runs.
        groups: Names of the groups, in the order in which they start.
        path: Its socket.
        logs: Folder of its log and of each program's.
        directory: Where the programs run.
        user: Who supervisord runs as; it warns when root does not say so.
    """
    # A `%` is doubled below, since supervisord expands %(...)s.
    sections: dict[str, dict[str, object]] = {
        "supervisord": {
            "nodaemon": "true",
            "silent": "true",
            "logfile": logs / "supervisord.log",
            "logfile_maxbytes": "1MB",
            "logfile_backups": 1,
            "pidfile": path.with_name("supervisord.own-pid"),
            **({"user": user} if user else {}),
        },
        "unix_http_server": {"file": path, "chmod": "0700"},
        "rpcinterface:supervisor": {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        },
    }
    for number, group in enumerate(groups):
        names = [program.name for program in programs if program.group == group]
        if names:
            sections[f"group:{group}"] = {"programs": ",".join(names), "priority": number}
    for program in programs:
        sections[f"program:{program.name}"] = {
            "command": shlex.join(program.command),
            "directory": directory,
            "autostart": str(program.group == groups[0]).lower(),
            "autorestart": "true",
            "startsecs": START_S,
            "startretries": START_RETRIES,
            "stopsignal": program.stop_signal,
            "stopwaitsecs": program.stop_s,
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": logs / f"{program.name}.log",
            "stdout_logfile_maxbytes": "10MB",
            "stdout_logfile_backups": 2,
        }
    return "\n".join(
        f"[{section}]\n"
        + "".join(f"{key} = {str(value).replace('%', '%%')}\n" for key, value in options.items())
        for section, options in sections.items()
    )


@dataclass(frozen=True)
class State:
    """How a program does."""

    name: str
    """supervisord's word: ``STARTING``, ``RUNNING``, ``BACKOFF``, ``FATAL``..."""
    pid: int
    age_s: int

    @property
    def runs(self) -> bool:
        """Whether there is a process; it need not be ready for anything."""
        return self.name in {"STARTING", "RUNNING"}


class Supervisor:
    """A running supervisord, asked over its socket.

    Its methods raise OSError while it does not answer.
    """

    def __init__(self, path: Path) -> None:
        self._server = xmlrpc.client.ServerProxy("http://localhost", transport=_Transport(path))

    def states(self) -> dict[str, State]:
        """Return how each program does."""
        return {
            info["name"]: State(info["statename"], info["pid"], info["now"] - info["start"])
            for info in self._call("getAllProcessInfo")
        }

    def start_group(self, group: str) -> None:
        """Start a group's programs, without waiting for them."""
        self._call("startProcessGroup", group, False)

    def start(self, group: str, name: str) -> None:
        """Start one program, without waiting for it."""
        self._call("startProcess", f"{group}:{name}", False)

    def _call(self, method: str, *words: object) -> Any:
        try:
            return getattr(self._server.supervisor, method)(*words)
        except (http.client.HTTPException, xmlrpc.client.Error) as error:
            raise ConnectionError(str(error)) from error


class _Transport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return _Connection(str(host), self._path)


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, path: Path) -> None:
        super().__init__(host, timeout=5)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
