"""Servers of the benchmark's own, and the processor time that each process takes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

import psycopg2

from positions.storage import migrate
from tests.integration.processes import environment
from tests.services import PostgreSQL, RabbitMQ, Redis

_TICKS = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[int]:
    """Return user, system, and reaped children's user and system time of a process, in ticks."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return [0, 0, 0, 0]
    return [int(each) for each in fields[11:15]]


def children_of(pid: int) -> list[int]:
    """Return the processes below ``pid``, all the way down."""
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found[1:]


def used_s(pid: int, *, below: bool = True) -> float:
    """Return the processor time that ``pid`` has used, with all ``below`` it that are or were, in seconds."""
    if not below:
        return sum(_stat(pid)[:2]) / _TICKS
    return sum(sum(_stat(each)) for each in (pid, *children_of(pid))) / _TICKS


def resident_mb(pid: int) -> float:
    """Return what a process holds of memory that is its own, in MB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no Pss of {pid}")


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """Let a process and all below it stand still."""
    tree = [pid, *children_of(pid)]
    for each in tree:
        os.kill(each, signal.SIGSTOP)
    try:
        yield
    finally:
        for each in tree:
            os.kill(each, signal.SIGCONT)


@dataclass(frozen=True)
class Place:
    """A database and a virtual host, both new."""

    name: str
    database: str
    broker: str
    env: dict[str, str]


class Machine:
    """PostgreSQL, RabbitMQ and Redis, started for this run; every commit is durable."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.postgres = self._stack.enter_context(PostgreSQL())
        self.rabbitmq = self._stack.enter_context(RabbitMQ())
        self.redis = self._stack.enter_context(Redis())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @contextmanager
    def place(self, **settings: str) -> Iterator[Place]:
        """Make a migrated database and a virtual host, and drop them."""
        name = f"benchmark_{uuid4().hex[:12]}"
        with closing(psycopg2.connect(self.postgres.url.replace("+psycopg2", ""))) as connection:
            connection.autocommit = True
            connection.cursor().execute(f"CREATE DATABASE {name}")
            database = f"{self.postgres.url.rpartition('/')[0]}/{name}"
            migrate.upgrade(database)
            broker = self.rabbitmq.add_vhost(name)
            yield Place(name, database, broker, environment(database, broker, self.redis.url, **settings))
            self.rabbitmq.delete_vhost(name)
            connection.cursor().execute(f"DROP DATABASE {name} WITH (FORCE)")

    def messages(self, place: Place) -> int:
        """Return how many messages lie in the queues of a place, delivered and not acknowledged ones too."""
        total = self.rabbitmq.evaluate(
            f'lists:sum([N || [{{messages, N}}] <- rabbit_amqqueue:info_all(<<"{place.name}">>, [messages])])'
        )
        return int(total)
