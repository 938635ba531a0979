"""The folder the embedded default keeps everything in: data, logs, passwords, ports."""

import fcntl
import json
import os
import secrets
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from positions.errors import PositionsError


class StartError(PositionsError):
    """The service cannot be started; the message says why and what to do."""


def default_path(environ: Mapping[str, str]) -> Path:
    """Return where the folder is unless a setting says otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/positions")
    state = environ.get("XDG_STATE_HOME", "")
    # The specification has a relative one ignored.
    return (Path(state) if state.startswith("/") else Path.home() / ".local/state") / "positions"


class Folder:
    """The open folder, which no other process opens as long as this one lives.

    Raises:
        StartError: it cannot be made or written, or another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "log"
        self.run = path / "run"
        try:
            # A server that may not run as root must be able to pass through.
            path.mkdir(mode=0o755 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for private in (self.logs, self.run):
                private.mkdir(mode=0o700, exist_ok=True)
        except BlockingIOError:
            holder = (path / "lock").read_text().strip()
            raise StartError(f"`positions up` runs on {path} already (process {holder})") from None
        except OSError as error:
            raise StartError(
                f"cannot keep data in {path}: {error.strerror} (POSITION_MANAGER_DATA_DIR names another)"
            ) from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())
        # A kill -9 between the two steps of _keep leaves nothing that matters: the old file stands.
        self._kept = path / "secrets.json"
        self._values: dict[str, str] = json.loads(self._kept.read_text()) if self._kept.exists() else {}

    def close(self) -> None:
        """Let another process open it."""
        os.close(self._lock)

    def secret(self, name: str) -> str:
        """Return the secret of this name, made when first asked for and kept."""
        if name not in self._values:
            self._keep(name, secrets.token_urlsafe(24))
        return self._values[name]

    def port(self, name: str) -> int:
        """Return the port of this name, kept as long as nobody else listens on it."""
        port = int(self._values.get(name, 0))
        # Below the range that outgoing connections are given: a client that retries against a server
        # which is down could otherwise be given that very port, and connect to itself.
        while not port or taken("127.0.0.1", port):
            port = 20_000 + secrets.randbelow(10_000)
        if self._values.get(name) != str(port):
            self._keep(name, str(port))
        return port

    def tail(self, name: str, lines: int = 15) -> str:
        """Return the last lines of a log."""
        with suppress(FileNotFoundError):
            text = (self.logs / f"{name}.log").read_text(errors="replace")
            return "\n".join(text.splitlines()[-lines:])
        return ""

    def _keep(self, name: str, value: str) -> None:
        self._values[name] = value
        new = self._kept.with_suffix(".new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(self._values, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._kept)


def taken(host: str, port: int) -> bool:
    """Return whether somebody listens on the port already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError:
        return True
    return False
