"""A server that answers as Bybit's REST API does, and fails as a test tells it to.

`Venue` keeps what the venue knows: `prices`, `positions`, `executions`. What `fails` says comes first,
one entry a request; what `always` says, to every request. By hand:
``python -m tests.venue 9999 BTCUSDT=50000``.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

KEY, SECRET = "venue-key", "venue-secret"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What is answered instead: an answer of its own, or a way to fail."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    hangs: bool = False
    """Nothing is answered until the venue closes."""
    drips: bool = False
    """The body comes by the byte, without an end."""
    drops: bool = False
    """The connection ends without an answer."""


HANGS, DRIPS, DROPS = Reply(hangs=True), Reply(drips=True), Reply(drops=True)


def refusal(code: int, message: str, **headers: str) -> Reply:
    """Return the venue's answer with a code of failure."""
    body = {"retCode": code, "retMsg": message, "result": {}, "retExtInfo": {}, "time": now_ms()}
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(body=json.dumps(body).encode(), headers=headers)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Venue:
    """The server. Its records have the shapes of the wire."""

    def __init__(self, port: int = 0) -> None:
        self.prices: dict[str, str] = {}
        """Mark prices by symbol, as they stand in the answer."""
        self.tickers: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda tickers: tickers
        """What becomes of the tickers before they are sent: the place for lies."""
        self.positions: list[dict[str, Any]] = []
        self.executions: list[dict[str, Any]] = []
        self.page: int | None = None
        """Records of a page where fewer than asked for."""
        self.time_ms: Callable[[], int] = now_ms
        self.fails: deque[Reply] = deque()
        self.always: Reply | None = None
        self.requests: list[str] = []
        """Paths with queries, as they came."""
        self.asked = threading.Semaphore(0)
        """Released once for each request, before it is answered."""
        self._connections: list[socket.socket] = []
        self._closing = threading.Event()
        self._port = port
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        self._closing.clear()
        venue = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                venue._handle(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def get_request(self) -> tuple[socket.socket, Any]:
                accepted = super().get_request()
                venue._connections.append(accepted[0])
                return accepted

        self._server = Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def stop(self) -> None:
        """Be dead: nobody listens, and what hangs ends."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(handler.path)
        self.asked.release()
        reply = self.fails.popleft() if self.fails else self.always
        handler.close_connection = reply is not None or self._closing.is_set()
        if reply is None:
            reply = self._answer(handler)
        if reply.hangs:
            self._closing.wait()
        if reply.hangs or reply.drops:
            return
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        if handler.close_connection:
            handler.send_header("Connection", "close")
        if reply.drips:
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            try:
                while not self._closing.wait(0.02):
                    handler.wfile.write(b"1\r\n \r\n")
            except OSError:
                return
            return
        handler.send_header("Content-Length", str(len(reply.body)))
        handler.end_headers()
        with suppress(OSError):
            handler.wfile.write(reply.body)

    def _answer(self, handler: BaseHTTPRequestHandler) -> Reply:
        parts = urlsplit(handler.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        if query.get("category") != "linear":
            return refusal(10001, "category only support linear")
        if parts.path == "/v5/market/tickers":
            return self._tickers(query)
        if parts.path not in ("/v5/position/list", "/v5/execution/list"):
            return Reply(status=404)
        if refused := _unsigned(handler, parts.query):
            return refused
        if parts.path == "/v5/position/list":
            return self._positions(query)
        return self._executions(query)

    def _tickers(self, query: dict[str, str]) -> Reply:
        wanted = [query["symbol"]] if "symbol" in query else list(self.prices)
        if any(symbol not in self.prices for symbol in wanted):
            return refusal(10001, "params error: symbol invalid")
        tickers = [
            {
                "symbol": symbol,
                "lastPrice": self.prices[symbol],
                "indexPrice": self.prices[symbol],
                "markPrice": self.prices[symbol],
                "fundingRate": "0.0001",
                "nextFundingTime": "1673280000000",
                "deliveryTime": "0",
            }
            for symbol in wanted
        ]
        return self._listed(self.tickers(tickers), "")

    def _positions(self, query: dict[str, str]) -> Reply:
        if "symbol" in query:
            found = [each for each in self.positions if each["symbol"] == query["symbol"]]
        elif "settleCoin" in query:
            found = [
                each
                for each in self.positions
                if each["symbol"].endswith(query["settleCoin"]) and float(each["size"])
            ]
        else:
            return refusal(10001, "symbol or settleCoin is required")
        return self._paged(found, query, most=200)

    def _executions(self, query: dict[str, str]) -> Reply:
        start, end = int(query["startTime"]), int(query["endTime"])
        if end - start > 7 * 86_400_000:
            return refusal(10001, "The time range between startTime and endTime cannot exceed 7 days.")
        found = [
            each
            for each in self.executions
            if start <= int(each["execTime"]) <= end and query.get("symbol") in (None, each["symbol"])
        ]
        found.sort(key=lambda each: -int(each["execTime"]))
        return self._paged(found, query, most=100)

    def _paged(self, records: list[dict[str, Any]], query: dict[str, str], *, most: int) -> Reply:
        limit = int(query.get("limit", "20"))
        if not 1 <= limit <= most:
            return refusal(10001, "limit is out of range")
        # As the venue's own, a cursor comes encoded once, and is sent back as it came.
        first = int(query["cursor"].partition(":")[2].partition(",")[0]) if "cursor" in query else 0
        last = first + min(limit, self.page or limit)
        return self._listed(records[first:last], quote(f"page:{last},{last}") if records[last:] else "")

    def _listed(self, records: list[dict[str, Any]], cursor: str) -> Reply:
        result = {"category": "linear", "list": records, "nextPageCursor": cursor}
        now = self.time_ms()
        body = {"retCode": 0, "retMsg": "OK", "result": result, "retExtInfo": {}, "time": now}
        limits = {"X-Bapi-Limit": "50", "X-Bapi-Limit-Status": "49", "X-Bapi-Limit-Reset-Timestamp": str(now)}
        return Reply(body=json.dumps(body).encode(), headers=limits)


def _unsigned(handler: BaseHTTPRequestHandler, query: str) -> Reply | None:
    said = {name.lower(): value for name, value in handler.headers.items()}
    key, at, window = (said.get(f"x-bapi-{name}", "") for name in ("api-key", "timestamp", "recv-window"))
    if key != KEY:
        return refusal(10003, "API key is invalid.")
    if not now_ms() - int(window) <= int(at) < now_ms() + 1000:
        return refusal(10002, "invalid request, please check your server timestamp or recv_window param.")
    signature = hmac.new(SECRET.encode(), f"{at}{key}{window}{query}".encode(), hashlib.sha256).hexdigest()
    if said.get("x-bapi-sign") != signature:
        return refusal(10004, f"error sign! origin_string[{unquote(query)}]")
    return None


if __name__ == "__main__":
    made = Venue(int(sys.argv[1]))
    for symbol, _, price in (pair.partition("=") for pair in sys.argv[2:]):
        made.prices[symbol] = price
    sys.stdout.write(f"{made.url}\n")
    threading.Event().wait()
