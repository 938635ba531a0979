"""The client against a server that answers, and fails, as each test tells it to."""

from __future__ import annotations

import json
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from traceback import TracebackException
from typing import Any, Self

import pytest

from positions import client as module
from positions.client import (
    ApiError,
    AssetTotals,
    Break,
    Client,
    ClientError,
    Execution,
    Exposure,
    History,
    NotFound,
    PnL,
    Point,
    Portfolio,
    Position,
    QuarantinedMessage,
    RateLimited,
    Replay,
    Snapshot,
    Unauthorized,
    Unavailable,
    Validation,
)
from tests.services import Port

KEY = "open-sesame"
AT = datetime(2025, 1, 15, 10, 0, 0, 120000, tzinfo=UTC)
AT_TEXT = "2025-01-15T10:00:00.120000Z"


@dataclass(frozen=True, kw_only=True)
class Reply:
    status: int = 200
    body: Any = None
    """Bytes as they are, anything else as JSON."""
    headers: dict[str, str] = field(default_factory=dict)
    then: Reply | None = None
    """What happens before the last byte: `DROP` or `HANG`."""


DROP = Reply(status=0)
"""The connection ends without an answer."""
HANG = Reply(status=-1)
"""It stays, and nothing comes."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    connection: int


class Service:
    """A server in a thread; replies in the order of ``script``, and with the last of it for ever."""

    def __init__(self, *script: Reply, port: int = 0) -> None:
        self.script = list(script)
        self.asked: list[Asked] = []
        self.connections = threading.Semaphore(0)
        """Released for each connection that has ended."""
        self._over = threading.Event()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                service._reply(self)

            do_POST = do_GET  # noqa: N815 - the name that http.server looks for

            def finish(self) -> None:
                super().finish()
                service.connections.release()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _reply(self, handler: BaseHTTPRequestHandler) -> None:
        port = handler.client_address[1]
        self.asked.append(
            Asked(
                method=handler.command,
                path=handler.path,
                headers={name.lower(): value for name, value in handler.headers.items()},
                connection=port,
            )
        )
        reply = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if reply.status > 0:
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            handler.send_response(reply.status)
            length = len(body) + (reply.then is not None)
            for name, value in {**reply.headers, "Content-Length": str(length)}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(body)
        if HANG in (reply, reply.then):
            # Longer than any client waits here.
            self._over.wait(10)
        handler.close_connection = reply.status <= 0 or reply.then is not None


class Clock:
    """Takes the place of the module `time`: a sleep is over at once, and remembered."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.then: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        self.then()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


class Both:
    """Services and their clients."""

    def __init__(self) -> None:
        self._made: list[Client | Service] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._made:
            each.close()

    def __call__(self, *script: Reply, **options: Any) -> tuple[Client, Service]:
        service = Service(*script)
        client = Client(service.address, KEY, **options)
        # Clients first, whose open connections the service would wait for.
        self._made[:0] = [client]
        self._made.append(service)
        return client, service


@pytest.fixture
def make() -> Iterator[Both]:
    with Both() as made:
        yield made


def _problem(status: int, code: str, **more: Any) -> Reply:
    headers = more.pop("headers", {})
    body = {"title": "T", "status": status, "detail": "what is wrong", "error_code": code, **more}
    return Reply(status=status, body=body, headers={"Content-Type": "application/problem+json", **headers})


POSITION = {
    "id": "0b0e7e4c-3c43-4b55-9c5a-0c4a3f1f6a01",
    "asset": "BTCUSDT",
    "mode": "one-way",
    "size": "1.5",
    "average_entry_price": "48666.666666666666666667",
    "current_price": "50000.123456789012345678",
    "current_price_at": AT_TEXT,
    "current_price_source": "price_api",
    "price_is_stale": False,
    "unrealized_pnl": "2000.185185183518518517",
    "realized_pnl": "-0.000000000000000001",
    "long_size": "1.5",
    "short_size": "0",
    "long_avg_price": "48666.666666666666666667",
    "short_avg_price": None,
    "unrealized_pnl_pct": "2.739979705730847286",
    "time_held_minutes": 90,
    "position_size_norm": "0.6",
    "version": 7,
    "last_updated": AT_TEXT,
    "last_snapshot_at": None,
    "opened_at": AT_TEXT,
    "closed_at": None,
    "created_at": "2025-01-15T10:00:00Z",
}
READ_POSITION = Position(
    id="0b0e7e4c-3c43-4b55-9c5a-0c4a3f1f6a01",
    asset="BTCUSDT",
    mode="one-way",
    size=Decimal("1.5"),
    average_entry_price=Decimal("48666.666666666666666667"),
    current_price=Decimal("50000.123456789012345678"),
    current_price_at=AT,
    current_price_source="price_api",
    price_is_stale=False,
    unrealized_pnl=Decimal("2000.185185183518518517"),
    realized_pnl=Decimal("-0.000000000000000001"),
    long_size=Decimal("1.5"),
    short_size=Decimal(0),
    long_avg_price=Decimal("48666.666666666666666667"),
    short_avg_price=None,
    unrealized_pnl_pct=Decimal("2.739979705730847286"),
    time_held_minutes=90,
    position_size_norm=Decimal("0.6"),
    version=7,
    last_updated=AT,
    last_snapshot_at=None,
    opened_at=AT,
    closed_at=None,
    created_at=datetime(2025, 1, 15, 10, 0, tzinfo=UTC),
)
EXECUTION = {
    "id": 12,
    "key": "k",
    "kind": "trade",
    "leg": "net",
    "quantity": "-0.1",
    "price": "100",
    "fee": None,
    "executed_at": AT_TEXT,
    "time_source": "event",
    "venue_seq": 34,
    "order_id": None,
    "exec_type": "Trade",
    "trace_id": "t",
    "recorded_at": AT_TEXT,
    "size_after": None,
}
READ_EXECUTION = Execution(
    id=12,
    key="k",
    kind="trade",
    leg="net",
    quantity=Decimal("-0.1"),
    price=Decimal(100),
    fee=None,
    executed_at=AT,
    time_source="event",
    venue_seq=34,
    order_id=None,
    exec_type="Trade",
    trace_id="t",
    recorded_at=AT,
    size_after=None,
)
SNAPSHOT = {
    "id": "s",
    "position_id": "p",
    "asset": "BTCUSDT",
    "mode": "hedge",
    "snapshot_data": {"size": "1"},
    "created_at": AT_TEXT,
}
READ_SNAPSHOT = Snapshot(
    id="s",
    position_id="p",
    asset="BTCUSDT",
    mode="hedge",
    snapshot_data={"size": "1"},
    created_at=AT,
)
SUMS = (
    "total_exposure_usdt",
    "net_exposure_usdt",
    "portfolio_value_usdt",
    "total_unrealized_pnl_usdt",
    "total_realized_pnl_usdt",
    "total_pnl_usdt",
    "total_realized_gross_usdt",
    "total_fees_usdt",
    "total_funding_usdt",
    "total_realized_adjustment_usdt",
)
COUNTS = ("open_positions_count", "long_positions_count", "short_positions_count")


def _sums(*names: str) -> tuple[dict[str, str], dict[str, Decimal]]:
    """Return sums as they are sent, each another one, and as they are read."""
    sent = {name: f"-{number}.000000000000000001" for number, name in enumerate(names)}
    return sent, {name: Decimal(text) for name, text in sent.items()}


ALL, READ_ALL = _sums(*SUMS)
PNL, READ_PNL = _sums(*SUMS[3:])
POINT, READ_POINT = _sums(*SUMS[:2], *SUMS[3:6], "drawdown_usdt")
OF_POINT: dict[str, Any] = {"positions_count": 2, "unpriced_positions_count": 1}
TOTALS = {"exposure": None, "unrealized": "1", "realized": "2", "size": "3", "exposure_usdt": None}
PORTFOLIO = {
    **ALL,
    **dict.fromkeys(COUNTS, 1),
    "by_asset": {"PEPE": TOTALS},
    "limit_exceeded": True,
    "unpriced_assets": ["PEPE"],
    "stale_assets": [],
    "calculated_at": AT_TEXT,
}
READ_PORTFOLIO: dict[str, Any] = {
    **READ_ALL,
    **dict.fromkeys(COUNTS, 1),
    "by_asset": {
        "PEPE": AssetTotals(exposure=None, unrealized=Decimal(1), realized=Decimal(2), size=Decimal(3))
    },
    "limit_exceeded": True,
    "unpriced_assets": ("PEPE",),
    "stale_assets": (),
    "calculated_at": AT,
}
BREAK = {
    "kind": "size",
    "leg": "net",
    "ours": "1",
    "theirs": "2",
    "cause": "missing_fill",
    "detail": None,
    "first_seen_at": AT_TEXT,
    "last_seen_at": AT_TEXT,
    "resolved_at": None,
    "resolution": None,
    "report_id": "r",
}
READ_BREAK = Break(
    kind="size",
    leg="net",
    ours=Decimal(1),
    theirs=Decimal(2),
    cause="missing_fill",
    detail=None,
    first_seen_at=AT,
    last_seen_at=AT,
    resolved_at=None,
    resolution=None,
    report_id="r",
)
MESSAGE = {
    "id": 5,
    "queue": "q",
    "reason": "no",
    "field": None,
    "trace_id": None,
    "times_seen": 2,
    "first_seen_at": AT_TEXT,
    "last_seen_at": AT_TEXT,
    "replayed_at": None,
    "body": "{",
    "headers": {"a": 1},
}
READ_MESSAGE = QuarantinedMessage(
    id=5,
    queue="q",
    reason="no",
    field=None,
    trace_id=None,
    times_seen=2,
    first_seen_at=AT,
    last_seen_at=AT,
    replayed_at=None,
    body="{",
    headers={"a": 1},
)
TOKYO = AT.astimezone(timezone(timedelta(hours=9)))
Call = Callable[[Client], object]
CALLS: list[tuple[Call, str, Any, object]] = [
    (
        lambda client: client.position("BTCUSDT"),
        "GET /positions/BTCUSDT?mode=one-way",
        POSITION,
        READ_POSITION,
    ),
    (
        lambda client: client.position("btc-usdt", "hedge", as_of=TOKYO),
        "GET /positions/btc-usdt?mode=hedge&as_of=2025-01-15T10%3A00%3A00.120000Z",
        POSITION,
        READ_POSITION,
    ),
    (
        lambda client: list(client.positions()),
        "GET /positions",
        {"positions": [POSITION, POSITION], "count": 2, "next_cursor": None},
        [READ_POSITION, READ_POSITION],
    ),
    (
        lambda client: list(
            client.positions(
                "BTC", "hedge", size_min=Decimal("-1E+3"), size_max=Decimal("1e-9"), status="open", limit=5
            )
        ),
        "GET /positions?asset=BTC&mode=hedge&size_min=-1000&size_max=0.000000001&status=open&limit=5",
        {"positions": [], "count": 0, "next_cursor": None},
        [],
    ),
    (
        lambda client: list(client.executions("BTC", limit=9)),
        "GET /positions/BTC/executions?mode=one-way&limit=9",
        {"executions": [EXECUTION], "count": 1, "next_cursor": None},
        [READ_EXECUTION],
    ),
    (
        lambda client: client.snapshots("BTC", "hedge", limit=1, from_=TOKYO),
        "GET /positions/BTC/snapshots?mode=hedge&limit=1&from=2025-01-15T10%3A00%3A00.120000Z",
        {"snapshots": [SNAPSHOT], "count": 1},
        [READ_SNAPSHOT],
    ),
    (
        lambda client: client.snapshots("BTC", offset=2, to=AT),
        "GET /positions/BTC/snapshots?mode=one-way&offset=2&to=2025-01-15T10%3A00%3A00.120000Z",
        {"snapshots": [], "count": 0},
        [],
    ),
    (
        lambda client: client.take_snapshot("BTC", "hedge"),
        "POST /positions/BTC/snapshot?mode=hedge",
        SNAPSHOT,
        READ_SNAPSHOT,
    ),
    (
        lambda client: client.validate("BTC", fix_discrepancies=False),
        "POST /positions/BTC/validate?mode=one-way&fix_discrepancies=false",
        {"is_valid": False, "error_message": "e", "updated_position": POSITION, "breaks": [BREAK]},
        Validation(is_valid=False, error_message="e", updated_position=READ_POSITION, breaks=(READ_BREAK,)),
    ),
    (
        lambda client: client.validate("BTC"),
        "POST /positions/BTC/validate?mode=one-way&fix_discrepancies=true",
        {"is_valid": True, "error_message": None, "updated_position": None, "breaks": []},
        Validation(is_valid=True, error_message=None, updated_position=None, breaks=()),
    ),
    (
        lambda client: client.portfolio(),
        "GET /portfolio?include_positions=false",
        PORTFOLIO,
        Portfolio(**READ_PORTFOLIO, positions=None, next_cursor=None),
    ),
    (
        lambda client: client.portfolio("BTC", include_positions=True),
        "GET /portfolio?asset=BTC&include_positions=true",
        {**PORTFOLIO, "positions": [POSITION], "next_cursor": "c"},
        Portfolio(**READ_PORTFOLIO, positions=(READ_POSITION,), next_cursor="c"),
    ),
    (
        lambda client: client.exposure(),
        "GET /portfolio/exposure",
        {
            "total_exposure_usdt": "3",
            "net_exposure_usdt": "-1",
            "by_asset": {"PEPE": TOTALS},
            "limit_exceeded": False,
            "unpriced_assets": ["PEPE"],
            "stale_assets": ["BTC"],
            "calculated_at": AT_TEXT,
        },
        Exposure(
            total_exposure_usdt=Decimal(3),
            net_exposure_usdt=Decimal(-1),
            by_asset=READ_PORTFOLIO["by_asset"],
            limit_exceeded=False,
            unpriced_assets=("PEPE",),
            stale_assets=("BTC",),
            calculated_at=AT,
        ),
    ),
    (
        lambda client: client.pnl(),
        "GET /portfolio/pnl",
        {**PNL, "by_asset": {"PEPE": TOTALS}, "calculated_at": AT_TEXT},
        PnL(
            **READ_PNL,
            by_asset=READ_PORTFOLIO["by_asset"],
            calculated_at=AT,
        ),
    ),
    (
        lambda client: client.history(to=AT, interval=3600),
        "GET /portfolio/history?to=2025-01-15T10%3A00%3A00.120000Z&interval=3600",
        {"points": [{"at": AT_TEXT, **POINT, **OF_POINT}], "count": 1, "interval_seconds": 3600},
        History(points=(Point(at=AT, **{**READ_POINT, **OF_POINT}),), interval_seconds=3600),
    ),
    (
        lambda client: list(client.quarantine(replayed=True, limit=3)),
        "GET /events/quarantine?replayed=true&limit=3",
        {"messages": [MESSAGE], "count": 1, "next_cursor": None},
        [READ_MESSAGE],
    ),
    (
        lambda client: client.replay(5),
        "POST /events/quarantine/5/replay",
        {"id": 5, "outcome": {"applied": 1}},
        Replay(id=5, outcome={"applied": 1}),
    ),
]


@pytest.mark.parametrize(("call", "request_line", "body", "expected"), CALLS, ids=[each[1] for each in CALLS])
def test_each_call_asks_its_route_and_reads_the_answer(
    make: Both, call: Call, request_line: str, body: Any, expected: object
) -> None:
    client, service = make(Reply(body=body), service="risk-manager")
    assert call(client) == expected
    [asked] = service.asked
    assert f"{asked.method} {asked.path}" == request_line.replace(" ", " /api/v1")
    assert asked.headers["x-api-key"] == KEY
    assert asked.headers["user-agent"] == "risk-manager positions-client"


def test_what_an_answer_may_gain_is_ignored(make: Both) -> None:
    client, _ = make(Reply(body={**POSITION, "mood": "calm"}))
    assert client.position("BTCUSDT") == READ_POSITION


def test_created_is_an_answer_too(make: Both) -> None:
    client, _ = make(Reply(status=201, body=SNAPSHOT))
    assert client.take_snapshot("BTCUSDT") == READ_SNAPSHOT


def test_times_are_utc_whatever_their_zone(make: Both) -> None:
    client, _ = make(Reply(body={**SNAPSHOT, "created_at": TOKYO.isoformat()}))
    assert client.take_snapshot("BTCUSDT").created_at.isoformat() == "2025-01-15T10:00:00.120000+00:00"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": None}, "size: None is no str"),
        ({"size": 1.5}, "size: 1.5 is no str"),
        ({"size": "NaN"}, "size: 'NaN' is no number"),
        ({"size": "much"}, "size: 'much' is no number"),
        ({"version": True}, "version: True is no int"),
        ({"version": "7"}, "version: '7' is no int"),
        ({"price_is_stale": 0}, "price_is_stale: 0 is no bool"),
        ({"closed_at": 5}, "closed_at: 5 is no str"),
        ({"created_at": "2025-01-15T10:00:00"}, "created_at: '2025-01-15T10:00:00' has no time zone"),
        ({"created_at": "today"}, "created_at: Invalid isoformat string: 'today'"),
    ],
)
def test_figure_of_another_kind_is_an_error_that_names_it(
    make: Both, change: dict[str, Any], said: str
) -> None:
    client, service = make(Reply(body={**POSITION, **change}))
    with pytest.raises(ClientError) as caught:
        client.position("BTCUSDT")
    assert str(caught.value) == f"the answer is not as expected: {said}"
    assert not isinstance(caught.value, ApiError)
    assert len(service.asked) == 1


@pytest.mark.parametrize("body", [b"<html>", b"", b"[]", b"null", b"\xff"])
def test_answer_that_is_no_object_is_an_error(make: Both, body: bytes) -> None:
    client, _ = make(Reply(body=body))
    with pytest.raises(ClientError, match=r"^200: the answer is no object of JSON"):
        client.portfolio()


@pytest.mark.parametrize("body", [{}, {"positions": {}}, {"positions": None}, {"positions": ["x"]}])
def test_list_that_is_none_is_an_error_and_not_empty(make: Both, body: Any) -> None:
    client, _ = make(Reply(body=body))
    with pytest.raises(ClientError, match="not as expected"):
        list(client.positions())


# --- pages


def test_pages_follow_each_other_as_they_are_read(make: Both) -> None:
    def page(asset: str, cursor: str | None) -> Reply:
        return Reply(body={"positions": [{**POSITION, "asset": asset}], "count": 1, "next_cursor": cursor})

    client, service = make(page("A", "one+/="), page("B", "two"), page("C", None))
    found = client.positions(mode="hedge", limit=1)
    assert service.asked == []
    assert next(found).asset == "A"
    assert len(service.asked) == 1
    assert [each.asset for each in found] == ["B", "C"]
    base = "/api/v1/positions?mode=hedge&limit=1"
    assert [each.path for each in service.asked] == [
        base,
        f"{base}&cursor=one%2B%2F%3D",
        f"{base}&cursor=two",
    ]


# --- errors


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ApiError),
        (401, Unauthorized),
        (403, Unauthorized),
        (404, NotFound),
        (409, ApiError),
        (429, RateLimited),
        (500, ApiError),
        (502, Unavailable),
        (503, Unavailable),
        (504, Unavailable),
    ],
)
def test_error_says_all_that_the_answer_says(make: Both, status: int, kind: type[ApiError]) -> None:
    headers = {"X-Trace-Id": "theirs", "Retry-After": "7"}
    client, _ = make(_problem(status, "some_code", details={"limit": "no"}, headers=headers), retries=0)
    with pytest.raises(ApiError) as caught:
        client.portfolio()
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.code, error.detail) == (status, "some_code", "what is wrong")
    assert (error.trace_id, error.details, error.retry_after_s) == ("theirs", {"limit": "no"}, 7)
    assert str(error) == f"{status} some_code: what is wrong (trace id theirs)"
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), copied.__dict__) == (kind, error.__dict__)


@pytest.mark.parametrize("body", [b"<html>Bad Gateway</html>", b"[1]", b'{"details": 5}'])
def test_error_of_someone_else_is_one_too(make: Both, body: bytes) -> None:
    client, service = make(Reply(status=502, body=body), retries=0)
    with pytest.raises(Unavailable) as caught:
        client.portfolio()
    error = caught.value
    assert (error.status, error.code, error.detail, error.details) == (502, "", "Bad Gateway", {})
    assert error.trace_id == service.asked[0].headers["x-trace-id"]


def test_position_that_is_not_there_is_none(make: Both) -> None:
    client, _ = make(_problem(404, "not_found"))
    assert client.position("BTCUSDT") is None
    with pytest.raises(NotFound):
        client.take_snapshot("BTCUSDT")


def test_missing_page_of_a_proxy_is_not_taken_for_a_missing_position(make: Both) -> None:
    client, _ = make(Reply(status=404, body=b"<html>Not Found</html>"))
    with pytest.raises(NotFound):
        client.position("BTCUSDT")


def test_unhealthy_is_an_answer(make: Both, clock: Clock) -> None:
    client, service = make(Reply(status=503, body={"status": "unhealthy"}))
    assert client.health() == {"status": "unhealthy"}
    assert ([each.path for each in service.asked], clock.slept) == (["/health"], [])
    client, service = make(Reply(status=503, body=b"<html>"), Reply(body={"status": "healthy"}))
    assert client.health() == {"status": "healthy"}
    assert len(service.asked) == 2


# --- retries


def _waits(slept: list[float]) -> list[float]:
    """Return the waits without their jitter, which adds a tenth at most."""
    for each, base in zip(slept, (0.1, 0.2, 0.4), strict=False):
        assert base <= each <= base * 1.1
    return [round(each / 1.05, 1) for each in slept]


def _name(value: object) -> str:
    if not isinstance(value, Reply):
        return str(value)
    how = {DROP.status: "drops", HANG.status: "hangs"}
    return f"{how.get(value.status, value.status)}{f' then {_name(value.then)}' if value.then else ''}"


GOOD = Reply(body=PORTFOLIO)


@pytest.mark.parametrize(
    "failure",
    [
        DROP,
        HANG,
        Reply(body=PORTFOLIO, then=DROP),
        *(Reply(status=status) for status in (429, 502, 503, 504)),
    ],
    ids=_name,
)
def test_get_is_tried_again(make: Both, clock: Clock, failure: Reply) -> None:
    client, service = make(failure, failure, failure, GOOD, timeout_s=0.2)
    assert client.portfolio().limit_exceeded
    assert len(service.asked) == 4
    assert len({each.headers["x-trace-id"] for each in service.asked}) == 1
    assert _waits(clock.slept) == [0.1, 0.2, 0.4]


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (DROP, "connection_lost"),
        (HANG, "timeout"),
        (Reply(then=DROP), "connection_lost"),
        (Reply(then=HANG), "timeout"),
        (Reply(status=503), ""),
    ],
    ids=_name,
)
def test_get_is_given_up_after_the_last_retry(make: Both, clock: Clock, failure: Reply, code: str) -> None:
    client, service = make(failure, timeout_s=0.2, retries=2)
    with pytest.raises(Unavailable) as caught:
        client.portfolio()
    assert caught.value.code == code
    assert caught.value.trace_id == service.asked[0].headers["x-trace-id"]
    assert (len(service.asked), len(clock.slept)) == (3, 2)


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 409, 500])
def test_get_that_cannot_succeed_is_not_tried_again(make: Both, clock: Clock, status: int) -> None:
    client, service = make(Reply(status=status, headers={"Retry-After": "1"}))
    with pytest.raises(ApiError):
        client.portfolio()
    assert (len(service.asked), clock.slept) == (1, [])


@pytest.mark.parametrize(
    "failure",
    [
        DROP,
        HANG,
        Reply(body=SNAPSHOT, then=DROP),
        *(Reply(status=status) for status in (409, 500, 502, 503, 504)),
    ],
    ids=_name,
)
def test_post_that_may_have_been_done_is_not_tried_again(make: Both, clock: Clock, failure: Reply) -> None:
    client, service = make(failure, Reply(status=201, body=SNAPSHOT), timeout_s=0.2)
    with pytest.raises(ApiError):
        client.take_snapshot("BTCUSDT")
    assert (len(service.asked), clock.slept) == (1, [])


def test_post_that_was_limited_is_tried_again(make: Both, clock: Clock) -> None:
    limited = Reply(status=429, headers={"Retry-After": "2"})
    client, service = make(limited, Reply(status=201, body=SNAPSHOT))
    assert client.take_snapshot("BTCUSDT") == READ_SNAPSHOT
    assert (len(service.asked), clock.slept) == (2, [2])


def test_refused_connection_is_tried_again_by_get_and_post(clock: Clock) -> None:
    for call in (Client.take_snapshot, Client.position):
        services: list[Service] = []
        with closing(Port()) as port, Client(f"http://127.0.0.1:{port.number}", KEY) as client:

            def start(number: int = port.number, services: list[Service] = services) -> None:
                services.append(Service(Reply(body={**POSITION, **SNAPSHOT}), port=number))

            clock.then = start
            clock.slept.clear()
            try:
                call(client, "BTCUSDT")
            finally:
                client.close()
                for service in services:
                    service.close()
            assert _waits(clock.slept) == [0.1]
            assert len(services[0].asked) == 1


def test_service_that_is_away_is_unavailable(clock: Clock) -> None:
    with closing(Port()) as port, Client(f"http://127.0.0.1:{port.number}", KEY) as client:
        for call in (Client.take_snapshot, Client.position):
            clock.slept.clear()
            with pytest.raises(Unavailable) as caught:
                call(client, "BTCUSDT")
            assert (caught.value.status, caught.value.code) == (None, "connection_refused")
            assert "refused" in caught.value.detail
            assert _waits(clock.slept) == [0.1, 0.2, 0.4]


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("3", 3, 3),
        ("0", 0, 0),
        ("%a, %d %b %Y %H:%M:%S GMT", 3400, 3600),
        # The zone is that of RFC 5322 for "unknown".
        ("%a, %d %b %Y %H:%M:%S -0000", 3400, 3600),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("soon", 0.1, 0.11),
        ("-5", 0.1, 0.11),
        ("", 0.1, 0.11),
    ],
)
def test_wait_is_as_long_as_retry_after_says(
    make: Both, clock: Clock, text: str, low: float, high: float
) -> None:
    # A date is of an hour from now.
    text = (datetime.now(UTC) + timedelta(hours=1)).strftime(text)
    client, _ = make(Reply(status=503, headers={"Retry-After": text}), GOOD, max_wait_s=4000)
    client.portfolio()
    [slept] = clock.slept
    assert low <= slept <= high


@pytest.mark.parametrize("text", ["31", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_no_wait_begins_that_would_be_too_long(make: Both, clock: Clock, text: str) -> None:
    client, service = make(Reply(status=429, headers={"Retry-After": text}))
    with pytest.raises(RateLimited) as caught:
        client.portfolio()
    assert (len(service.asked), clock.slept) == (1, [])
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 31


def test_all_waits_together_are_bounded(make: Both, clock: Clock) -> None:
    client, service = make(Reply(status=503, headers={"Retry-After": "12"}), retries=9)
    with pytest.raises(Unavailable):
        client.portfolio()
    assert (len(service.asked), clock.slept) == (3, [12, 12])
    # What the tries themselves take counts too.
    client, service = make(Reply(status=503), retries=9, max_wait_s=1)
    clock.slept.clear()
    clock.then = lambda: setattr(clock, "now", clock.now + 0.5)
    with pytest.raises(Unavailable):
        client.portfolio()
    assert (len(service.asked), _waits(clock.slept)) == (3, [0.1, 0.2])


# --- the key


@pytest.mark.parametrize(
    "failure", [DROP, HANG, Reply(status=503), Reply(status=401), Reply(body=b"?")], ids=_name
)
def test_key_is_in_no_text(make: Both, caplog: pytest.LogCaptureFixture, failure: Reply) -> None:
    caplog.set_level(logging.DEBUG)
    client, service = make(failure, timeout_s=0.2, retries=1)
    with pytest.raises(ClientError) as caught:
        client.portfolio()
    assert service.asked[0].headers["x-api-key"] == KEY
    told = "".join(TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "portfolio" in told
    assert "positions" in repr(client) or "127.0.0.1" in repr(client)
    for text in (told, repr(caught.value), str(caught.value), repr(client), caplog.text):
        assert KEY not in text


@pytest.mark.parametrize("key", ["open-sesame\n", " open-sesame", "open\rsesame", "open-\x00sesame"])
def test_key_that_cannot_be_sent_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ValueError, match=r"^api_key: ") as caught:
        Client("http://127.0.0.1:4800", key)
    assert "sesame" not in str(caught.value)


def test_key_is_sent_as_utf_8(make: Both) -> None:
    _, service = make(GOOD)
    with Client(service.address, "schlüssel") as client:
        client.portfolio()
    assert service.asked[0].headers["x-api-key"].encode("latin-1").decode() == "schlüssel"


def test_redirect_leads_the_key_nowhere(make: Both) -> None:
    _, stranger = make(GOOD)
    client, _ = make(Reply(status=307, headers={"Location": f"{stranger.address}/api/v1/portfolio"}))
    with pytest.raises(ApiError) as caught:
        client.portfolio()
    assert (caught.value.status, stranger.asked) == (307, [])


def test_proxy_of_the_environment_is_not_asked(make: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    client, service = make(GOOD)
    _, proxy = make(GOOD)
    monkeypatch.setenv("http_proxy", proxy.address)
    monkeypatch.delenv("no_proxy", raising=False)
    client.portfolio()
    assert (len(service.asked), proxy.asked) == (1, [])


# --- arguments


@pytest.mark.parametrize("address", ["", "127.0.0.1:4800", "ftp://host", "http://", "http://me:word@host"])
def test_address_that_cannot_be_asked_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"^address: ") as caught:
        Client(address, KEY)
    assert "word" not in str(caught.value)


def test_path_of_the_address_stays(make: Both) -> None:
    _, service = make(GOOD)
    with Client(f"{service.address}/behind/a/proxy/", KEY) as client:
        client.portfolio()
    assert service.asked[0].path.startswith("/behind/a/proxy/api/v1/portfolio?")


@pytest.mark.parametrize("asset", ["", ".", "..", "BTC/USDT", "BTC?x", "BTC#", "BTC USDT", "%2e", "ÄBC"])
def test_asset_that_would_change_the_address_is_refused(make: Both, asset: str) -> None:
    client, service = make(Reply(body=POSITION))
    with pytest.raises(ValueError, match=r"^asset: "):
        client.position(asset)
    assert service.asked == []


def test_time_without_a_zone_is_refused(make: Both) -> None:
    client, service = make(Reply(body=POSITION))
    with pytest.raises(ValueError, match=r"^as_of: must have a time zone"):
        client.position("BTCUSDT", as_of=AT.replace(tzinfo=None))
    assert service.asked == []


# --- trace ids


def test_each_request_has_a_trace_id_of_its_own_or_the_one_given(make: Both) -> None:
    client, service = make(GOOD)
    client.portfolio()
    client.portfolio()
    client.traced("mine.1").portfolio()
    client.portfolio()
    first, second, third, fourth = (each.headers["x-trace-id"] for each in service.asked)
    assert third == "mine.1"
    assert len({first, second, fourth}) == 3
    assert {len(first), len(second), len(fourth)} == {32}
    assert len({each.connection for each in service.asked}) == 1


@pytest.mark.parametrize("given", ["", "a b", "a\nb", "-a", "x" * 129])
def test_trace_id_that_would_be_replaced_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"^trace_id: "), Client("http://127.0.0.1:4800", KEY) as client:
        client.traced(given)


# --- threads and connections


def test_threads_may_share_a_client(make: Both) -> None:
    client, service = make(GOOD)
    barrier = threading.Barrier(8, timeout=30)
    found: list[bool] = []

    def ask() -> None:
        barrier.wait()
        found.extend(client.portfolio().limit_exceeded for _ in range(5))
        # All still live: the connection of a thread that ends may be another's next.
        barrier.wait()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 40
    assert len({each.connection for each in service.asked}) == 8


def test_close_closes_the_connections_of_all_threads(make: Both) -> None:
    client, service = make(GOOD)
    asked, done = threading.Barrier(2, timeout=30), threading.Event()

    def ask() -> None:
        client.traced("other").portfolio()
        asked.wait()
        done.wait(30)

    thread = threading.Thread(target=ask)
    thread.start()
    asked.wait()
    with client:
        client.portfolio()
    assert all(service.connections.acquire(timeout=10) for _ in range(2))
    done.set()
    thread.join()
