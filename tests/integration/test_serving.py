"""The REST API as gunicorn serves it: to clients and operators of every kind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from tests.integration.api import APPLICATION, GUNICORN, KEY, ROOT, Served, environ, served, store
from tests.services import PostgreSQL, wait_until

IMPATIENT = "tests.integration.impatient_app:create_app({})"
WITH_KEY = {"X-API-Key": KEY}
Settings = dict[str, str]


@pytest.fixture
def settings(database_url: str, broker_url: str, redis_url: str) -> Settings:
    return environ(database_url, broker_url, redis_url, POSITION_MANAGER_RATE_LIMIT_ENABLED="false")


@pytest.fixture
def gunicorn(settings: Settings, tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, settings) as api:
        yield api


def _store(database: str, *assets: str) -> None:
    rows = (
        {"asset": asset, "mode": "one-way", "size": 1, "long_size": 1, "last_updated": datetime.now(UTC)}
        for asset in assets
    )
    store(database, *rows)


def _together(count: int, work: Callable[[], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def _all(connection: socket.socket) -> bytes:
    """Return what comes until the other side hangs up."""
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


def test_requests_are_served_and_logged_with_a_line_each(
    gunicorn: Served, database_url: str, broker_url: str
) -> None:
    _store(database_url, "BTCUSDT")
    headers = {**WITH_KEY, "X-Trace-Id": "through-gunicorn"}
    status, answered, body = gunicorn.get("/api/v1/positions?asset=btcusdt", headers)
    assert status == 200
    assert json.loads(body)["positions"][0]["size"] == "1"
    assert answered["X-Trace-Id"] == "through-gunicorn"
    assert answered["Server"] == "position-manager"
    assert gunicorn.get("/api/v1/positions", {"X-API-Key": "wrong"})[0] == 401
    assert json.loads(gunicorn.get("/health")[2])["status"] == "healthy"

    gunicorn.process.send_signal(signal.SIGTERM)
    assert gunicorn.process.wait(30) == 0
    assert [line["status"] for line in gunicorn.served(trace_id="through-gunicorn")] == [200]
    assert len(gunicorn.served(route="/api/v1/positions")) == 2
    assert all(line["timestamp"].endswith("Z") and line["service"] for line in gunicorn.lines)
    assert not [line for line in gunicorn.lines if line["logger"] == "gunicorn.access"]
    for secret in (KEY, "asset=btcusdt", broker_url):
        assert secret not in gunicorn.log


def test_many_are_served_at_once(gunicorn: Served, database_url: str) -> None:
    _store(database_url, *(f"C{number:03}" for number in range(100)))
    statuses: list[int] = []

    def ask() -> None:
        paths = ("/api/v1/positions", "/api/v1/portfolio", "/health") * 5
        statuses.extend(gunicorn.get(path, WITH_KEY)[0] for path in paths)

    for thread in _together(16, ask):
        thread.join()
    assert statuses == [200] * 16 * 15


def test_without_a_key_it_says_so_in_one_line() -> None:
    done = subprocess.run(
        [*GUNICORN, APPLICATION],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("POSITION_MANAGER_")},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "positions: POSITION_MANAGER_API_KEY: required, the key that clients send as X-API-Key"
    )


# --- requests that are none


BROKEN = {
    "long line": (b"GET /made-up" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n", 414, "request_uri_too_long"),
    "many headers": (
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: made-up\r\n" % each for each in range(60)) + b"\r\n",
        431,
        "request_header_fields_too_large",
    ),
    "long header": (
        b"GET / HTTP/1.1\r\nX: made-up" + b"x" * 9000 + b"\r\n\r\n",
        431,
        "request_header_fields_too_large",
    ),
    "no HTTP": (b"made-up\r\n\r\n", 400, "bad_request"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "bad_request"),
    "version": (b"GET / HTTP/9.9\r\n\r\n", 400, "bad_request"),
    "header": (b"GET / HTTP/1.1\r\nmade up: 1\r\n\r\n", 400, "bad_request"),
    "two lengths": (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "bad_request"),
    "coding": (b"POST / HTTP/1.1\r\nTransfer-Encoding: made-up\r\n\r\n", 501, "not_implemented"),
}


def test_broken_request_is_answered_as_any_other(gunicorn: Served) -> None:
    _, usual, _ = gunicorn.get("/nothing")
    before = len(gunicorn.lines)
    traces = []
    for name, (request, status, code) in BROKEN.items():
        with gunicorn.connect() as connection:
            connection.sendall(request)
            head, _, body = _all(connection).decode().partition("\r\n\r\n")
        first, *lines = head.split("\r\n")
        assert first.startswith(f"HTTP/1.1 {status} "), name
        headers = dict(line.split(": ", 1) for line in lines)
        problem = json.loads(body)
        assert problem.pop("trace_id") == headers["X-Trace-Id"]
        assert problem.pop("detail") == problem.pop("message")
        assert problem.pop("title")
        assert problem == {
            "type": "about:blank",
            "status": status,
            "instance": "/",
            "error_code": code,
            "details": {},
        }, name
        assert headers.pop("Connection") == "close"
        assert headers.pop("Content-Length") == str(len(body))
        same = headers.keys() - {"X-Trace-Id", "Date"}
        assert {each: headers[each] for each in same} == {each: usual[each] for each in same}, name
        assert {"X-Content-Type-Options", "X-Frame-Options", "Content-Security-Policy", "Server"} <= same
        assert "made" not in head + body, name
        traces.append((headers["X-Trace-Id"], status))
    lines_of_requests = [line for line in gunicorn.lines[before:] if line["event"] == "request_served"]
    assert [(line["trace_id"], line["status"]) for line in lines_of_requests] == traces
    assert {line["event"] for line in lines_of_requests} == {"request_served"}
    assert "made" not in str(lines_of_requests)


@pytest.mark.parametrize("chunks", [b"2\r\n{}\r\n0\r\n\r\n", b"no-size\r\n"], ids=["good", "broken"])
def test_body_in_chunks_gets_one_answer(gunicorn: Served, chunks: bytes) -> None:
    head = b"POST /api/v1/positions/BTCUSDT/validate HTTP/1.1\r\nConnection: close\r\n"
    with gunicorn.connect() as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        received = _all(connection)
    assert received.startswith(b"HTTP/1.1 411 ")
    assert received.count(b"HTTP/1.1") == 1
    told, _, body = received.decode().partition("\r\n\r\n")
    assert "Content-Type: application/problem+json\r\n" in told
    assert (json.loads(body)["status"], json.loads(body)["error_code"]) == (411, "length_required")


def test_clients_that_vanish_leave_no_traceback(gunicorn: Served, database_url: str) -> None:
    _store(database_url, *(f"C{number:03}" for number in range(500)))
    list_all = f"GET /api/v1/positions HTTP/1.1\r\nX-API-Key: {KEY}\r\n\r\n".encode()
    for request in (b"", b"GET /hea", b"GET /health HTTP/1.1\r\n\r\n", list_all, list_all * 3):
        for _ in range(5):
            with gunicorn.connect() as connection:
                # Closed with a reset, whatever was not read yet.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.sendall(request)
    assert gunicorn.get("/health")[0] == 200
    gunicorn.process.send_signal(signal.SIGTERM)
    assert gunicorn.process.wait(30) == 0
    assert not [line for line in gunicorn.lines if line["level"] in ("error", "critical")]
    assert "Traceback" not in gunicorn.log


# --- clients that are slow


def test_clients_that_say_nothing_hold_no_thread(settings: Settings, tmp_path: Path) -> None:
    small = {"POSITION_MANAGER_WEB_WORKERS": "1", "POSITION_MANAGER_WEB_THREADS": "1"}
    with served(tmp_path, {**settings, **small}) as api, ExitStack() as silent:
        for _ in range(20):
            silent.enter_context(api.connect())
        # Each would hold the thread for five seconds.
        assert api.get("/health/live", limit_s=40)[0] == 200


def test_clients_that_do_not_hang_up_do_not_stop_the_worker(settings: Settings, tmp_path: Path) -> None:
    small = {"POSITION_MANAGER_WEB_WORKERS": "1", "POSITION_MANAGER_WEB_THREADS": "20"}
    with served(tmp_path, {**settings, **small}) as api, ExitStack() as lingering:
        connections = [lingering.enter_context(api.connect()) for _ in range(19)]
        for connection in connections:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nConnection: close\r\n\r\n")
        # gunicorn would wait two seconds for each, one after the other, and do nothing else.
        assert api.get("/health/live", limit_s=20)[0] == 200
        for connection in connections:
            assert connection.recv(12) == b"HTTP/1.1 200"


def _headers_that_never_end(connection: socket.socket) -> None:
    connection.sendall(b"x")


def _answers_unread(connection: socket.socket) -> None:
    del connection


@pytest.mark.parametrize(
    ("request_", "then"),
    [
        (b"GET /health/live HTTP/1.1\r\nX-Slow: ", _headers_that_never_end),
        (b"POST /api/v1/positions HTTP/1.1\r\nContent-Length: 60000\r\n\r\nx", _headers_that_never_end),
        (
            f"GET /api/v1/positions HTTP/1.1\r\nX-API-Key: {KEY}\r\n\r\n".encode() * 40,
            _answers_unread,
        ),
    ],
    ids=["headers", "body", "unread"],
)
def test_slow_client_is_cut_off(
    request_: bytes,
    then: Callable[[socket.socket], None],
    settings: Settings,
    database_url: str,
    tmp_path: Path,
) -> None:
    _store(database_url, *(f"C{number:03}" for number in range(1000)))
    small = {"POSITION_MANAGER_WEB_WORKERS": "1", "POSITION_MANAGER_WEB_THREADS": "1"}
    app = IMPATIENT.format("request_max_s=1")
    with served(tmp_path, {**settings, **small}, app=app) as api, api.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request_)
        stop = threading.Event()

        def be_slow() -> None:
            while not stop.wait(0.1):
                try:
                    then(connection)
                except OSError:
                    return

        (slow,) = _together(1, be_slow)
        try:
            # There is one thread, and the slow client would have it for ever; not reading, only once the
            # buffers between are full.
            for _ in range(30):
                assert api.get("/health/live", limit_s=40)[0] == 200
        finally:
            stop.set()
            slow.join()
        assert not [line for line in api.lines if line["level"] in ("error", "critical")]


# --- what the main loop answers itself


KEPT = "/api/v1/portfolio"
BIG = "/api/v1/positions?limit=500"


def _asking(path: str, *more: str, version: str = "1.1") -> bytes:
    return "\r\n".join((f"GET {path} HTTP/{version}", f"X-API-Key: {KEY}", *more, "", "")).encode()


class Client:
    """A plain connection, and what comes over it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._received = connection.makefile("rb")

    def answer(self) -> tuple[str, dict[str, str], bytes]:
        """Return the first line, the headers and the body of the next answer; nothing where there is none."""
        first, headers = self._received.readline().decode().strip(), {}
        while line := self._received.readline().decode().strip():
            name, _, value = line.partition(": ")
            assert name not in headers
            headers[name] = value
        return first, headers, self._received.read(int(headers.get("Content-Length", 0)))

    def ask(self, *more: str, path: str = KEPT) -> tuple[str, dict[str, str], bytes]:
        self.connection.sendall(_asking(path, *more))
        return self.answer()


class Busy:
    """A service whose one thread is busy until it is let go; what is kept was asked for before."""

    def __init__(self, api: Served, folder: Path, clients: ExitStack) -> None:
        self.api = api
        self._folder = folder
        self._clients = clients
        self.first = {path: self.client().ask(path=path) for path in (KEPT, BIG)}

    def client(self) -> Client:
        return Client(self._clients.enter_context(self.api.connect()))

    def asked_in_vain(self, client: Client) -> int:
        """Ask for more than the buffers hold, and read nothing; return how often was asked."""
        for count in range(100):
            if not wait_until(lambda: len(self.api.served(trace_id="slow")) == count, limit_s=1):  # noqa: B023
                return count
            client.connection.sendall(_asking(BIG, "X-Trace-Id: slow"))
        raise AssertionError("it took them all")

    def connections(self) -> int:
        """Return how many files and sockets the worker has open."""
        return len(list(Path(f"/proc/{self.api.workers[0]}/fd").iterdir()))

    def let_go(self) -> None:
        (self._folder / "go").touch()


@contextmanager
def _busy(settings: Settings, url: str, folder: Path, **more: float) -> Iterator[Busy]:
    _store(url, *(f"C{number:03}" for number in range(1000)))
    held = folder / "held"
    held.mkdir()
    small = {"POSITION_MANAGER_WEB_WORKERS": "1", "POSITION_MANAGER_WEB_THREADS": "1"}
    arguments = "".join(f", {name}={value}" for name, value in more.items())
    app = f"tests.integration.held_app:create_app({str(held)!r}, kept_s=600{arguments})"
    engine = create_engine(url)
    versions = text(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND query LIKE '%FROM portfolio_versions'"
    )

    def asks_apart() -> bool:
        """Tell whether the main loop has asked for the version too, and not only the thread."""
        assert busy.client().ask()[0] == "HTTP/1.1 200 OK"
        with engine.connect() as connection:
            found: int = connection.execute(versions).scalar_one()
        return found == 2

    with served(folder, {**settings, **small}, app=app) as api, ExitStack() as clients:
        busy = Busy(api, held, clients)
        assert wait_until(asks_apart, limit_s=60)
        engine.dispose()
        busy.client().connection.sendall(b"GET /held HTTP/1.1\r\n\r\n")
        assert wait_until(lambda: bool(list(held.iterdir())), limit_s=60)
        try:
            yield busy
        finally:
            busy.let_go()


def test_kept_answers_need_no_thread(settings: Settings, database_url: str, tmp_path: Path) -> None:
    with _busy(settings, database_url, tmp_path) as busy:
        client = busy.client()
        for path, (first, headers, body) in busy.first.items():
            for trace_id in ("one", "two", "two"):
                answer = client.ask(f"X-Trace-Id: {trace_id}", path=path)
                same = {"Date": answer[1]["Date"], "X-Trace-Id": trace_id}
                assert answer == (first, headers | same, body)
            known, its_headers, nothing = client.ask(f"If-None-Match: {headers['ETag']}", path=path)
            assert (known, nothing) == ("HTTP/1.1 304 NOT MODIFIED", b"")
            assert its_headers["ETag"] == headers["ETag"]
        # Clients that vanish.
        for _ in range(3):
            vanishing = busy.client().connection
            vanishing.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            vanishing.sendall(_asking(BIG))
            vanishing.close()
        # One that does not read.
        slow = busy.client()
        count = busy.asked_in_vain(slow)
        for _ in range(3):
            assert client.ask()[0] == "HTTP/1.1 200 OK"
        assert {slow.answer()[2] for _ in range(count)} == {busy.first[BIG][2]}


def test_bug_in_the_main_loop_is_answered_and_logged_as_any(settings: Settings, tmp_path: Path) -> None:
    one = {"POSITION_MANAGER_WEB_WORKERS": "1"}
    app = "tests.integration.mistaken_app:create_app()"
    with served(tmp_path, {**settings, **one}, app=app) as api:
        with closing(HTTPConnection("127.0.0.1", api.port, timeout=60)) as connection:
            connection.request("GET", "/health/live?mistaken", headers={"X-Trace-Id": "t-500"})
            response = connection.getresponse()
            body = json.loads(response.read())
            assert (response.status, response.headers["Content-Type"]) == (500, "application/problem+json")
            assert (body["error_code"], body["trace_id"]) == ("internal_error", "t-500")
            # The next one on the same connection has nothing of it.
            connection.request("GET", "/health/live")
            assert connection.getresponse().status == 200
        [failed] = [line for line in api.lines if line["event"] == "request_failed"]
        assert "a fault of ours" in json.dumps(failed)
        assert len(api.served(trace_id="t-500", status=500)) == 1


def test_what_is_not_plain_waits_for_a_thread(settings: Settings, database_url: str, tmp_path: Path) -> None:
    with _busy(settings, database_url, tmp_path) as busy:
        parts, two, last, old, broken = (busy.client() for _ in range(5))
        whole = _asking(KEPT, "X-Trace-Id: not-plain")
        parts.connection.sendall(whole[:-1])
        two.connection.sendall(whole * 2)
        last.connection.sendall(_asking(KEPT, "X-Trace-Id: not-plain", "Connection: close"))
        old.connection.sendall(_asking(KEPT, "X-Trace-Id: not-plain", version="1.0"))
        broken.connection.sendall(b"GET / HTTP/1.1\r\nno header\r\n\r\n")
        assert busy.client().ask()[0] == "HTTP/1.1 200 OK"
        assert not busy.api.served(trace_id="not-plain")
        parts.connection.sendall(whole[-1:])
        busy.let_go()
        body = busy.first[KEPT][2]
        for client in (parts, two, two, last):
            first, headers, found = client.answer()
            assert (first, found) == ("HTTP/1.1 200 OK", body)
            assert headers["Connection"] == ("close" if client is last else "keep-alive")
        assert old.answer()[2] == body
        assert broken.answer()[0] == "HTTP/1.1 400 BAD REQUEST"
        for client in (last, old, broken):
            assert client.answer() == ("", {}, b"")
        for client in (parts, two):
            assert client.ask()[2] == body


def test_who_does_not_read_a_kept_answer_is_cut_off(
    settings: Settings, database_url: str, tmp_path: Path
) -> None:
    with _busy(settings, database_url, tmp_path, request_max_s=1) as busy:
        before = busy.connections()
        slow = busy.client()
        busy.asked_in_vain(slow)
        assert wait_until(lambda: busy.connections() == before, limit_s=60)
        assert busy.client().ask()[0] == "HTTP/1.1 200 OK"


# --- a database that stands still


def test_frozen_database_is_given_up_and_used_again(
    postgres: PostgreSQL, settings: Settings, database_url: str, tmp_path: Path
) -> None:
    _store(database_url, "BTCUSDT")
    small = {"POSITION_MANAGER_WEB_WORKERS": "1", "POSITION_MANAGER_WEB_THREADS": "4"}
    paths = ("/api/v1/positions", "/api/v1/positions/BTCUSDT", "/api/v1/portfolio", "/api/v1/portfolio/pnl")
    app = IMPATIENT.format("answer_s=2, probe_s=0.2")
    with served(tmp_path, {**settings, **small}, app=app) as api:
        for path in paths:
            assert api.get(path, WITH_KEY)[0] == 200, path
        answers: list[tuple[int, dict[str, str], bytes]] = []

        def ask() -> None:
            answers.extend(api.get(path, WITH_KEY, limit_s=60) for path in paths[:2])

        with postgres.frozen():
            for thread in _together(8, ask):
                thread.join()
            assert {status for status, _, _ in answers} == {503}
            for _, headers, body in answers:
                assert json.loads(body)["error_code"] == "unavailable"
                assert int(headers["Retry-After"]) > 0
            # Each thread waits to the end once; from then on one request at a time does, for a short while.
            waits_s = [line["limit_s"] for line in api.lines if line["event"] == "waited_in_vain"]
            assert 1 <= sum(limit_s > 0.5 for limit_s in waits_s) <= 4
            assert api.get("/health/live")[0] == 200
            assert api.get("/health/ready")[0] == 503
            assert api.get("/health")[0] == 503
            assert api.get("/metrics")[0] == 200
        _store(database_url, "ETHUSDT")
        assert wait_until(lambda: api.get("/api/v1/positions", WITH_KEY)[0] == 200, limit_s=30)
        for path in paths:
            assert api.get(path, WITH_KEY)[0] == 200, path
        assert json.loads(api.get(paths[0], WITH_KEY)[2])["count"] == 2
        assert api.get("/health/ready")[0] == 200
        assert not [line for line in api.lines if line["level"] in ("error", "critical")]


# --- operators


def test_requests_in_flight_are_answered_before_it_stops(settings: Settings, tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    app = f"tests.integration.held_app:create_app({str(held)!r})"
    with served(tmp_path, settings, app=app) as api:
        answers: list[tuple[int, bytes]] = []

        def ask() -> None:
            status, _, body = api.get("/held")
            answers.append((status, body))

        asking = _together(4, ask)
        assert wait_until(lambda: len(list(held.iterdir())) == 4, limit_s=30)
        api.process.send_signal(signal.SIGTERM)
        assert wait_until(lambda: "Handling signal: term" in api.log, limit_s=10)
        (held / "go").touch()
        for thread in asking:
            thread.join()
        assert answers == [(200, b"held")] * 4
        assert api.process.wait(30) == 0


def _entry(name: str) -> dict[str, str]:
    return {"name": name, "hash": hashlib.sha256(name.encode()).hexdigest(), "role": "read"}


def test_reload_reads_the_settings_and_fails_no_request(
    settings: Settings, database_url: str, tmp_path: Path
) -> None:
    _store(database_url, "BTCUSDT")
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([_entry("old")]))
    with served(tmp_path, {**settings, "POSITION_MANAGER_API_KEYS": str(keys)}) as api:
        assert api.get("/api/v1/positions", {"X-API-Key": "new"})[0] == 401
        stop = threading.Event()
        failures: list[object] = []
        answered: list[int] = []

        def ask() -> None:
            with closing(HTTPConnection("127.0.0.1", api.port, timeout=30)) as connection:
                while not stop.is_set():
                    fresh = connection.sock is None
                    try:
                        connection.request("GET", "/api/v1/positions/BTCUSDT", headers=WITH_KEY)
                        response = connection.getresponse()
                        response.read()
                    except (ConnectionError, HTTPException) as error:
                        connection.close()
                        # A connection that was closed while it was idle: every client has to expect that.
                        if fresh:
                            failures.append(error)
                        continue
                    answered.append(response.status)
                    if response.status != 200:
                        failures.append(response.status)

        clients = _together(6, ask)
        try:
            for name in ("new", "newer"):
                old = set(api.workers)
                keys.write_text(json.dumps([_entry(name)]))
                api.process.send_signal(signal.SIGHUP)
                assert wait_until(lambda old=old: not old & set(api.workers), limit_s=30)  # type: ignore[misc]
                assert api.get("/api/v1/positions", {"X-API-Key": name})[0] == 200
        finally:
            stop.set()
            for client in clients:
                client.join()
        assert failures == []
        assert answered
        assert api.get("/api/v1/positions", {"X-API-Key": "old"})[0] == 401


def test_broken_file_of_keys_leaves_the_last_good_ones(settings: Settings, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([_entry("good")]))
    with served(tmp_path, {**settings, "POSITION_MANAGER_API_KEYS": str(keys)}) as api:

        def replaced(old: set[int]) -> None:
            assert wait_until(lambda: len(api.workers) == 2 and not old & set(api.workers), limit_s=30)

        def statuses(key: str) -> set[int]:
            return {api.get("/api/v1/nothing", {"X-API-Key": key})[0] for _ in range(10)}

        def reload() -> None:
            old = set(api.workers)
            api.process.send_signal(signal.SIGHUP)
            replaced(old)

        keys.write_text("{ no list of keys")
        reload()
        [told] = [line for line in api.lines if line["event"] == "api_keys_unreadable"]
        assert "POSITION_MANAGER_API_KEYS" in told["reason"]
        assert statuses("good") == {404}
        # Also for workers that begin while it is broken.
        killed = api.workers
        for worker in killed:
            os.kill(worker, signal.SIGKILL)
        replaced(set(killed))
        assert statuses("good") == {404}
        keys.write_text(json.dumps([_entry("mended")]))
        reload()
        assert statuses("mended") == {404}
        assert statuses("good") == {401}


def test_tls_of_its_own_is_refused_at_start(settings: Settings) -> None:
    ended = subprocess.run(
        [*GUNICORN, "--certfile", "any.pem", APPLICATION],
        env={**os.environ, **settings},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode != 0
    assert "TLS is for the proxy in front" in ended.stderr + ended.stdout
