"""The REST API for tests: in this process, and as gunicorn serves it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from flask import Flask
from sqlalchemy import create_engine, insert
from werkzeug.test import TestResponse

from positions.settings import load
from positions.storage import tables
from positions.web import create_app, resources
from tests.integration.support import changed
from tests.services import Port, wait_until

ROOT = Path(__file__).resolve().parents[2]
KEY = "open-sesame"
NOWHERE = "127.0.0.1:1"
QUEUE = "ws-gateway.position"
GUNICORN = [sys.executable, "-m", "gunicorn", "-c", "python:positions.web.gunicorn_conf"]
APPLICATION = "positions.web:create_app()"

Make = Callable[..., Flask]


def environ(database: str, broker: str, redis: str, **more: str) -> dict[str, str]:
    """Return the settings of an API on the servers given."""
    return {
        "POSITION_MANAGER_API_KEY": KEY,
        "POSITION_MANAGER_DATABASE_URL": database,
        "POSITION_MANAGER_BROKER_URL": broker,
        "POSITION_MANAGER_REDIS_URL": redis,
        **more,
    }


@contextmanager
def applications() -> Iterator[Make]:
    """Make applications on the servers given, on none where none is given."""
    made: list[Flask] = []

    def make(
        database: str, broker: str = f"amqp://{NOWHERE}//", redis: str = f"redis://{NOWHERE}/0", **more: str
    ) -> Flask:
        app = create_app(load(environ(database, broker, redis, **more)))
        made.append(app)
        return app

    yield make
    for app in made:
        app.extensions[resources.NAME].engine.dispose()


def store(database: str, *rows: dict[str, Any]) -> None:
    """Store rows of positions."""
    engine = create_engine(database)
    with engine.begin() as connection:
        for row in rows:
            connection.execute(insert(tables.positions).values(row))
        changed(connection)
    engine.dispose()


def problem(response: TestResponse, status: int, code: str) -> dict[str, Any]:
    """Return the problem document that an answer must be."""
    assert response.status_code == status
    assert response.content_type == "application/problem+json"
    body: dict[str, Any] = json.loads(response.data)
    assert body["type"] == "about:blank"
    assert body["status"] == status
    assert body["title"]
    assert body["instance"] == response.request.path
    assert body["error_code"] == code
    assert body["message"] == body["detail"]
    assert body["trace_id"] == response.headers["X-Trace-Id"]
    return body


class Served:
    """gunicorn with the API, as it is deployed."""

    def __init__(self, port: int, log: Path, env: Mapping[str, str], app: str) -> None:
        self.port = port
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen([*GUNICORN, app], cwd=ROOT, env=env, stderr=output, stdout=output)

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What was logged; fails where anything but our lines was."""
        return [json.loads(line) for line in self.log.splitlines()]

    def served(self, **fields: Any) -> list[dict[str, Any]]:
        """Return the lines of requests with these fields."""
        return [
            line
            for line in self.lines
            if line["event"] == "request_served" and fields.items() <= line.items()
        ]

    @property
    def workers(self) -> list[int]:
        """Process ids of the workers."""
        pid = self.process.pid
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(each) for each in listed.split()]

    def get(
        self, path: str, headers: Mapping[str, str] | None = None, *, limit_s: float = 30
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body; status 0 where the connection was closed without an answer."""
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=limit_s)) as connection:
            try:
                connection.request("GET", path, headers=dict(headers or {}))
                response = connection.getresponse()
                return response.status, dict(response.getheaders()), response.read()
            except ConnectionError:
                return 0, {}, b""

    def connect(self) -> socket.socket:
        """Return a plain connection, for a client that is not as it should be."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)


@contextmanager
def served(folder: Path, settings: Mapping[str, str], *, app: str = APPLICATION) -> Iterator[Served]:
    """Run gunicorn with the API until it answers."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("POSITION_MANAGER_", "PROMETHEUS_"))
    }
    with closing(Port()) as kept:
        address = {"POSITION_MANAGER_HOST": "127.0.0.1", "POSITION_MANAGER_PORT": str(kept.number)}
        api = Served(kept.number, folder / "web.log", {**inherited, **settings, **address}, app)
        try:
            assert wait_until(
                lambda: api.process.poll() is not None or api.get("/health/live")[0] == 200,
                limit_s=30,
                interval_s=0.1,
            ), api.log
            assert api.process.poll() is None, api.log
            yield api
        finally:
            api.process.terminate()
            try:
                api.process.wait(15)
            except subprocess.TimeoutExpired:
                api.process.kill()
                api.process.wait()
