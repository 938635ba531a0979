"""The subscription at the gateway: asked for until it is there, against a server that fails as it may."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import pytest
import requests
from structlog.testing import capture_logs

from positions.settings import SettingsError, load
from positions.tasks import gateway

KEY = "a-key-nobody-may-see"


class Gateway:
    """Answers with one status after the other; `None`: not at all."""

    def __init__(self) -> None:
        self.answers: list[int | None] = []
        self.asked: list[tuple[str, str, Any]] = []
        self.released = Event()
        own = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                own.asked.append((self.path, self.headers["X-API-Key"], body))
                status = own.answers.pop(0)
                if status is None:
                    own.released.wait(30)
                    return
                self.send_response(status)
                if status == 307:
                    self.send_header("Location", f"http://127.0.0.1:{own.server.server_port}/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def server() -> Iterator[Gateway]:
    made = Gateway()
    thread = Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.released.set()
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def subscribe(url: str, key: str = KEY) -> list[float]:
    """Subscribe, and return the waits."""
    waits: list[float] = []
    gateway.subscribe(load({"WS_GATEWAY_URL": url, "WS_GATEWAY_API_KEY": key}), wait=waits.append)
    return waits


@pytest.mark.parametrize("status", [200, 201, 409])
@pytest.mark.parametrize("slash", ["", "/"])
def test_the_gateway_is_asked_as_agreed_and_409_is_as_good(server: Gateway, status: int, slash: str) -> None:
    server.answers = [status]
    assert subscribe(server.url + slash) == []
    wanted = {"channel_type": "position", "requesting_service": "position-manager"}
    assert server.asked == [("/api/v1/subscriptions", KEY, wanted)]


def test_failures_are_tried_again_after_bounded_waits(
    server: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "READ_S", 0.2)
    server.answers = [500, None, 401, 429, 503, 307, 404, 500, 201]
    assert subscribe(server.url) == [1, 2, 4, 8, 16, 32, 60, 60]
    assert {path for path, _, _ in server.asked} == {"/api/v1/subscriptions"}


def test_a_gateway_that_is_not_there_yet_is_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gateway.subscribe(load({"WS_GATEWAY_URL": nowhere, "WS_GATEWAY_API_KEY": KEY}), wait=wait)
    assert waits == [1, 2, 4]


def test_the_key_is_never_logged(server: Gateway) -> None:
    server.answers = [401, 201]
    with capture_logs() as logs:
        subscribe(server.url)
        with pytest.raises(KeyboardInterrupt):
            gateway.subscribe(
                load({"WS_GATEWAY_URL": server.url, "WS_GATEWAY_API_KEY": f"{KEY}\r\nX: {KEY}"}), wait=_stop
            )
    assert [each["event"] for each in logs] == [
        "gateway_not_subscribed",
        "gateway_subscribed",
        "gateway_not_subscribed",
    ]
    assert logs[0]["reason"] == "HTTP 401"
    assert KEY not in str(logs)


def _stop(_: float) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("named", [{}, {"WS_GATEWAY_URL": "http://gateway"}, {"WS_GATEWAY_API_KEY": KEY}])
def test_without_both_nobody_is_asked(named: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "post", _stop)
    gateway.subscribe(load(named))


@pytest.mark.parametrize("url", ["gateway:8080", "ftp://gateway", f"http://user:{KEY}@gateway", "http://"])
def test_a_wrong_address_is_named_at_start_without_its_value(url: str) -> None:
    with pytest.raises(SettingsError, match="WS_GATEWAY_URL") as error:
        load({"WS_GATEWAY_URL": url})
    assert KEY not in str(error.value)
