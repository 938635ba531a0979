"""Where the servers' programs are on this machine."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RabbitMQPrograms:
    server: Path
    erlang: Path  # the folder of erl, epmd and erl_call
    environment: dict[str, str] = field(default_factory=dict)


def postgres_programs() -> Path:
    """Return the folder of initdb and postgres, the newest of those installed."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    return max(found, key=lambda path: int(path.parent.name))


def redis_program() -> Path:
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    assert found
    return Path(found)


def rabbitmq_programs() -> RabbitMQPrograms:
    erl = shutil.which("erl")
    assert erl
    return RabbitMQPrograms(
        server=Path("/usr/lib/rabbitmq/bin/rabbitmq-server"), erlang=Path(erl).resolve().parent
    )
