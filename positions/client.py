"""A client of the REST API, for services and people: `Client`.

It needs nothing of `positions` beside this file, and of others only requests. Sizes, prices and money are
`Decimal`, in the asset's own units and in USDT; times are aware, UTC.
"""

import copy
import random
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from email.utils import parsedate_to_datetime
from functools import cache, partial
from types import TracebackType, UnionType
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit
from uuid import uuid4
from weakref import WeakSet

import requests

Result = TypeVar("Result")

FIRST_WAIT_S = 0.1
_REFUSED = "connection_refused"
# What is not of these would make another address of the one it is put into: a slash, a dot.
_ASSET = re.compile(r"[A-Za-z0-9-]+")
# Any other the service would replace by one of its own.
_TRACE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


class ClientError(Exception):
    """Base of the client's errors; itself: an answer that is not of the API's shape."""


class ApiError(ClientError):
    """The service refused or failed, or did not answer.

    Args:
        status: of the answer; None where there was none.
        code: ``error_code`` of the answer, empty where it is not one of the service's own; without an
            answer ``connection_refused``, ``timeout`` or ``connection_lost``.
        detail: what is wrong, for people.
        trace_id: under which the service's logs know the call.
        details: of a 400, each parameter's name to what is wrong with it.
        retry_after_s: when to ask again at the soonest, where the answer says so.
    """

    def __init__(  # noqa: PLR0917 - by position, so that the error can be pickled and crosses processes
        self,
        status: int | None,
        code: str,
        detail: str,
        trace_id: str,
        details: Mapping[str, Any] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(status, code, detail, trace_id, details, retry_after_s)
        self.status = status
        self.code = code
        self.detail = detail
        self.trace_id = trace_id
        self.details = details or {}
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        what = " ".join(str(each) for each in (self.status, self.code) if each)
        return f"{what}: {self.detail} (trace id {self.trace_id})"


class Unauthorized(ApiError):
    """The key is not known, or may not do this."""


class NotFound(ApiError):
    """There is no such thing."""


class RateLimited(ApiError):
    """More requests than the key may make, also after all retries."""


class Unavailable(ApiError):
    """The service, or what it needs, is away; the same call may succeed later.

    A POST may have been done all the same, unless the connection was refused.
    """


_ERRORS: Mapping[int | None, type[ApiError]] = {
    None: Unavailable,
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    429: RateLimited,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """What is held of one asset in one mode."""

    id: str
    asset: str
    mode: str
    """``one-way`` or ``hedge``."""
    size: Decimal
    """Signed; in hedge mode the sum of both legs."""
    average_entry_price: Decimal | None
    """None when flat, and in hedge mode while both legs are open."""
    current_price: Decimal | None
    current_price_at: datetime | None
    current_price_source: str | None
    """``report`` or ``price_api``."""
    price_is_stale: bool
    unrealized_pnl: Decimal
    realized_pnl: Decimal
    """Net of fees and funding, since the first event."""
    long_size: Decimal
    short_size: Decimal
    """0 or less."""
    long_avg_price: Decimal | None
    short_avg_price: Decimal | None
    unrealized_pnl_pct: Decimal | None
    """Percent; None only while neither an average nor a price is known."""
    time_held_minutes: int
    position_size_norm: Decimal | None
    """Share of the portfolio's gross exposure, 0 to 1; None only while unpriced."""
    version: int
    last_updated: datetime
    last_snapshot_at: datetime | None
    opened_at: datetime | None
    closed_at: datetime | None
    created_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """An entry of the ledger: one of those that made a position what it is."""

    id: int
    key: str
    """What makes it unique: the execution's id, or what stands in for it."""
    kind: str
    leg: str
    quantity: Decimal
    """Signed."""
    price: Decimal
    fee: Decimal | None
    """Paid is positive; None: an order report that did not say."""
    executed_at: datetime
    time_source: str
    venue_seq: int | None
    order_id: str | None
    exec_type: str
    trace_id: str
    recorded_at: datetime
    size_after: Decimal | None
    """The size an adjustment took its leg to; None for whatever is no adjustment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A position as it was at a moment."""

    id: str
    position_id: str
    asset: str
    mode: str
    snapshot_data: Mapping[str, Any]
    """As it was stored: decimals and times are text."""
    created_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Break:
    """A figure in which the fills and the exchange's reports differ."""

    kind: str
    leg: str
    ours: Decimal
    theirs: Decimal
    cause: str
    """``missing_fill``, ``duplicate``, ``funding``, ``manual_trade``, ``rounding`` or ``unknown``."""
    detail: str | None
    """The evidence for it, in words."""
    first_seen_at: datetime
    last_seen_at: datetime
    resolved_at: datetime | None
    resolution: str | None
    report_id: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """How a position compares with its ledger and with the newest exchange report."""

    is_valid: bool
    error_message: str | None
    updated_position: Position | None
    breaks: tuple[Break, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class AssetTotals:
    """What all positions of one asset add up to."""

    exposure: Decimal | None
    """Gross, over the priced positions; None while all open ones are unpriced."""
    unrealized: Decimal
    realized: Decimal
    size: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class Portfolio:
    """What all positions add up to; exposures over the priced ones only."""

    total_exposure_usdt: Decimal
    net_exposure_usdt: Decimal
    portfolio_value_usdt: Decimal
    total_unrealized_pnl_usdt: Decimal
    total_realized_pnl_usdt: Decimal
    """Gross - fees + funding + adjustment, exactly."""
    total_pnl_usdt: Decimal
    total_realized_gross_usdt: Decimal
    total_fees_usdt: Decimal
    """Paid is positive."""
    total_funding_usdt: Decimal
    """Received is positive."""
    total_realized_adjustment_usdt: Decimal
    open_positions_count: int
    long_positions_count: int
    short_positions_count: int
    by_asset: Mapping[str, AssetTotals]
    limit_exceeded: bool
    unpriced_assets: tuple[str, ...]
    """Those left out of the exposures, as no price is known for them."""
    stale_assets: tuple[str, ...]
    """Those valued at a price older than the staleness threshold."""
    calculated_at: datetime
    positions: tuple[Position, ...] | None
    """The first thousand; None where they were not asked for."""
    next_cursor: str | None
    """None where these are all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exposure:
    """What the priced positions are worth."""

    total_exposure_usdt: Decimal
    net_exposure_usdt: Decimal
    by_asset: Mapping[str, AssetTotals]
    limit_exceeded: bool
    unpriced_assets: tuple[str, ...]
    """Those left out of the exposures, as no price is known for them."""
    stale_assets: tuple[str, ...]
    """Those valued at a price older than the staleness threshold."""
    calculated_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class PnL:
    """Profit and loss of all positions, and what the realized one is made of."""

    total_unrealized_pnl_usdt: Decimal
    total_realized_pnl_usdt: Decimal
    total_pnl_usdt: Decimal
    total_realized_gross_usdt: Decimal
    total_fees_usdt: Decimal
    """Paid is positive."""
    total_funding_usdt: Decimal
    """Received is positive."""
    total_realized_adjustment_usdt: Decimal
    by_asset: Mapping[str, AssetTotals]
    calculated_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A point of the equity curve."""

    at: datetime
    total_exposure_usdt: Decimal
    net_exposure_usdt: Decimal
    total_unrealized_pnl_usdt: Decimal
    total_realized_pnl_usdt: Decimal
    total_pnl_usdt: Decimal
    drawdown_usdt: Decimal
    positions_count: int
    unpriced_positions_count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """The equity curve."""

    points: tuple[Point, ...]
    interval_seconds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantinedMessage:
    """A message that could not be applied."""

    id: int
    queue: str
    reason: str
    field: str | None
    trace_id: str | None
    times_seen: int
    first_seen_at: datetime
    last_seen_at: datetime
    replayed_at: datetime | None
    body: str
    headers: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What came of applying a quarantined message again."""

    id: int
    outcome: Mapping[str, int]


class Client:
    """Calls the REST API of one service.

    Threads may share a client: each has a connection of its own. A GET is tried again when there is no
    answer, on 429, 502, 503 and 504; a POST only when it was surely not done: on 429, and when the connection
    is refused. Before the first retry it waits 0.1 s, before each further one twice as long, each with
    jitter, or as long as ``Retry-After`` says. Redirects are not followed, as they could lead the key to
    strangers; cookies, netrc and the environment's proxies are not used.

    Every method raises `ApiError`, or one of its subclasses, where the service refuses or does not answer;
    `ClientError` where it answers something else than this client knows; and ValueError where an argument
    cannot be sent. Those that return an iterator ask, and raise, while it is read.

    Args:
        address: like ``http://127.0.0.1:4800``, what stands before ``/api/v1``.
        api_key: sent with every request; in no text of this client.
        timeout_s: to connect, and to wait for the next part of an answer.
        retries: further tries after the first.
        max_wait_s: from the start of a request; no wait for a retry ends later, and where it would, the
            error is raised at once. Each page of an iterator is a request.
        service: the caller's name, for the User-Agent.
        ca_bundle: file of the certificates to trust for https; None: those that come with requests.

    Raises:
        ValueError: the address, key or name cannot be used.
    """

    def __init__(
        self,
        address: str,
        api_key: str,
        *,
        timeout_s: float = 5,
        retries: int = 3,
        max_wait_s: float = 30,
        service: str | None = None,
        ca_bundle: str | None = None,
    ) -> None:
        parts = urlsplit(address)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username or parts.query:
            raise ValueError("address: must be like http://127.0.0.1:4800")
        for name, text in (("api_key", api_key), ("service", service or "")):
            # requests would refuse it too, but say it aloud.
            if text != text.strip() or not text.isprintable():
                raise ValueError(f"{name}: has white space around it, or a control character in it")
        self.address = address.rstrip("/")
        self.timeout_s = timeout_s
        self.retries = retries
        self.max_wait_s = max_wait_s
        self.trace_id: str | None = None
        self._headers = {
            "X-API-Key": api_key.encode(),
            "User-Agent": " ".join(filter(None, (service, "positions-client"))).encode(),
        }
        self._ca_bundle = ca_bundle
        # requests does not promise that a session can be shared.
        self._own = threading.local()
        self._sessions: WeakSet[requests.Session] = WeakSet()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections of all threads."""
        for session in list(self._sessions):
            session.close()

    def traced(self, trace_id: str) -> Self:
        """Return this client, over the same connections, with one trace id for all its requests.

        Without, each request has a fresh one.

        Raises:
            ValueError: it is not of the form that the service takes over.
        """
        if not _TRACE_ID.fullmatch(trace_id):
            raise ValueError("trace_id: must be 1 to 128 letters, digits and ._:-")
        traced = copy.copy(self)
        traced.trace_id = trace_id
        return traced

    def positions(
        self,
        asset: str | None = None,
        mode: str | None = None,
        *,
        size_min: Decimal | None = None,
        size_max: Decimal | None = None,
        status: str | None = None,
        limit: int | None = None,
    ) -> Iterator[Position]:
        """Yield all positions that meet every condition given, in order of asset and mode.

        Args:
            asset: in any case.
            mode: ``one-way`` or ``hedge``.
            size_min: smallest signed size.
            size_max: largest signed size.
            status: ``open`` or ``closed``.
            limit: how many to ask for at a time.
        """
        params = {
            "asset": asset,
            "mode": mode,
            "size_min": size_min,
            "size_max": size_max,
            "status": status,
            "limit": limit,
        }
        return self._pages("/api/v1/positions", params, "positions", tuple[Position, ...])

    def position(self, asset: str, mode: str = "one-way", as_of: datetime | None = None) -> Position | None:
        """Return one position, as it is or as it was at a moment; None where there is none."""
        try:
            answer = self._ask("GET", _path(asset), {"mode": mode, "as_of": as_of})
        except NotFound as error:
            # A 404 of someone else, as of a proxy, says nothing of positions.
            if error.code != "not_found":
                raise
            return None
        return _read(Position, answer)

    def executions(
        self,
        asset: str,
        mode: str = "one-way",
        limit: int | None = None,
        *,
        from_: datetime | None = None,
        to: datetime | None = None,
    ) -> Iterator[Execution]:
        """Yield the ledger behind a position, the newest first, asking for ``limit`` entries at a time."""
        params = {"mode": mode, "limit": limit, "from": from_, "to": to}
        return self._pages(_path(asset, "executions"), params, "executions", tuple[Execution, ...])

    def snapshots(
        self,
        asset: str,
        mode: str = "one-way",
        *,
        limit: int | None = None,
        offset: int | None = None,
        from_: datetime | None = None,
        to: datetime | None = None,
    ) -> list[Snapshot]:
        """Return snapshots of a position, the newest first: a hundred, or ``limit`` of them."""
        params = {"mode": mode, "limit": limit, "offset": offset, "from": from_, "to": to}
        answer = self._ask("GET", _path(asset, "snapshots"), params)
        return list(_read(tuple[Snapshot, ...], answer.get("snapshots")))

    def take_snapshot(self, asset: str, mode: str = "one-way") -> Snapshot:
        """Take a snapshot of a position now."""
        return _read(Snapshot, self._ask("POST", _path(asset, "snapshot"), {"mode": mode}))

    def validate(self, asset: str, mode: str = "one-way", *, fix_discrepancies: bool = True) -> Validation:
        """Compare a position with its ledger and with the newest exchange report."""
        params = {"mode": mode, "fix_discrepancies": fix_discrepancies}
        return _read(Validation, self._ask("POST", _path(asset, "validate"), params))

    def portfolio(
        self, asset: str | None = None, *, include_positions: bool = False, as_of: datetime | None = None
    ) -> Portfolio:
        """Return what all positions, or those in one asset, add up to, or did at the moment ``as_of``."""
        params = {"asset": asset, "include_positions": include_positions, "as_of": as_of}
        return _read(Portfolio, self._ask("GET", "/api/v1/portfolio", params))

    def exposure(self) -> Exposure:
        """Return what the positions are worth."""
        return _read(Exposure, self._ask("GET", "/api/v1/portfolio/exposure"))

    def pnl(self) -> PnL:
        """Return the profit and loss of all positions."""
        return _read(PnL, self._ask("GET", "/api/v1/portfolio/pnl"))

    def history(
        self, from_: datetime | None = None, to: datetime | None = None, interval: int | None = None
    ) -> History:
        """Return the equity curve, a point every ``interval`` seconds."""
        params = {"from": from_, "to": to, "interval": interval}
        return _read(History, self._ask("GET", "/api/v1/portfolio/history", params))

    def health(self) -> dict[str, Any]:
        """Return how the service is, also where it is ``unhealthy``; decimals and times are text."""
        return self._ask("GET", "/health", answers={200, 503})

    def quarantine(self, *, replayed: bool = False, limit: int | None = None) -> Iterator[QuarantinedMessage]:
        """Yield the messages that could not be applied, the newest first.

        Args:
            replayed: those that were replayed too.
            limit: how many to ask for at a time.
        """
        params = {"replayed": replayed, "limit": limit}
        kind = tuple[QuarantinedMessage, ...]
        return self._pages("/api/v1/events/quarantine", params, "messages", kind)

    def replay(self, message_id: int) -> Replay:
        """Apply a quarantined message again."""
        return _read(Replay, self._ask("POST", f"/api/v1/events/quarantine/{message_id:d}/replay"))

    def _pages(
        self, path: str, params: Mapping[str, object], name: str, kind: type[tuple[Result, ...]]
    ) -> Iterator[Result]:
        cursor = None
        while True:
            answer = self._ask("GET", path, {**params, "cursor": cursor})
            yield from _read(kind, answer.get(name))
            cursor = answer.get("next_cursor")
            if cursor is None:
                return

    def _ask(
        self,
        method: str,
        path: str,
        params: Mapping[str, object] | None = None,
        *,
        answers: Collection[int] = (200, 201),
    ) -> dict[str, Any]:
        """Return the answer of one of the statuses ``answers``, after as many tries as are allowed."""
        trace_id = self.trace_id or uuid4().hex
        query = {name: _text(name, value) for name, value in (params or {}).items() if value is not None}
        end, wait_s, left = time.monotonic() + self.max_wait_s, FIRST_WAIT_S, self.retries
        while True:
            found = self._try(method, path, query, trace_id, answers)
            if not isinstance(found, ApiError):
                return found
            pause_s = found.retry_after_s
            if pause_s is None:
                # The jitter adds at most a tenth, so that clients who were refused together part.
                pause_s = wait_s * random.uniform(1.0, 1.1)  # noqa: S311 - not a secret
                wait_s *= 2
            if left <= 0 or not _may_be_repeated(method, found) or time.monotonic() + pause_s > end:
                raise found
            left -= 1
            time.sleep(pause_s)

    def _try(
        self, method: str, path: str, query: Mapping[str, str], trace_id: str, answers: Collection[int]
    ) -> dict[str, Any] | ApiError:
        """Return the answer, or the error: raised in here, it would lead to the request and so to the key."""
        try:
            response = self._session().request(
                method,
                self.address + path,
                params=query,
                headers={"X-Trace-Id": trace_id},
                timeout=self.timeout_s,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            return _no_answer(error, trace_id)
        return _answer(response, trace_id, answers)

    def _session(self) -> requests.Session:
        """Return the present thread's own session."""
        session: requests.Session | None = getattr(self._own, "session", None)
        if session is None:
            session = self._own.session = requests.Session()
            session.trust_env = False
            session.verify = self._ca_bundle or True
            session.headers.update(self._headers)
            self._sessions.add(session)
        return session


def _may_be_repeated(method: str, error: ApiError) -> bool:
    if error.status is None:
        return method == "GET" or error.code == _REFUSED
    return error.status == 429 or (method == "GET" and error.status in {502, 503, 504})


def _answer(
    response: requests.Response, trace_id: str, answers: Collection[int]
) -> dict[str, Any] | ApiError:
    status = response.status_code
    try:
        body = response.json()
    except ValueError:
        body = None
    if isinstance(body, dict) and status in answers:
        return body
    trace_id = response.headers.get("X-Trace-Id", trace_id)
    if status < 300:
        raise ClientError(f"{status}: the answer is no object of JSON (trace id {trace_id})")
    problem = body if isinstance(body, dict) else {}
    details = problem.get("details")
    return _ERRORS.get(status, ApiError)(
        status,
        str(problem.get("error_code", "")),
        str(problem.get("detail", response.reason)),
        trace_id,
        details if isinstance(details, dict) else None,
        _retry_after_s(response.headers.get("Retry-After")),
    )


def _no_answer(error: BaseException, trace_id: str) -> ApiError:
    # What requests and urllib3 say of it is long; what the system said is behind it.
    while inner := error.__cause__ or error.__context__:
        error = inner
    code = "timeout" if isinstance(error, TimeoutError) else "connection_lost"
    if isinstance(error, ConnectionRefusedError):
        code = _REFUSED
    return Unavailable(None, code, str(error) or type(error).__name__, trace_id)


def _retry_after_s(text: str | None) -> float | None:
    """Return the seconds that a Retry-After asks for, as a number or a date; None where it is neither."""
    if text is None or text.isdecimal():
        return None if text is None else float(text)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    # An HTTP date is GMT, also where its zone is written in a way that says nothing.
    at = at.replace(tzinfo=UTC) if at.tzinfo is None else at
    return max(0.0, (at - datetime.now(UTC)).total_seconds())


def _path(asset: str, *more: str) -> str:
    if not _ASSET.fullmatch(asset):
        raise ValueError("asset: must be a symbol of letters, digits and hyphens, like BTCUSDT")
    return "/".join(("/api/v1/positions", asset, *more))


def _text(name: str, value: object) -> str:
    """Return a parameter as it stands in an address."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(f"{name}: must have a time zone")
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return str(value)


def _read(kind: Callable[..., Result], value: object) -> Result:
    """Return a ``kind``, read from the value of a JSON document by its type hints.

    Fields that the kind does not know are ignored; one that may be None may be missing.

    Raises:
        ClientError: the value is of another shape.
    """
    try:
        found: Result = _reader(kind)(value)
    except ValueError as error:
        raise ClientError(f"the answer is not as expected: {error}") from None
    return found


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """Return what reads a ``kind``; it raises ValueError on any other value."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return partial(_none_or, _reader(inner[0]))
    if origin is tuple:
        return partial(_several, _reader(inner[0]))
    if origin is Mapping:
        return partial(_mapping, _reader(inner[1]))
    return partial(_record, kind, {name: _reader(each) for name, each in get_type_hints(kind).items()})


def _none_or(read: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else read(value)


def _several(read: Callable[[Any], Any], value: Any) -> tuple[Any, ...]:
    return tuple(map(read, _checked(list, value)))


def _mapping(read: Callable[[Any], Any], value: Any) -> dict[str, Any]:
    return {name: read(each) for name, each in _checked(dict, value).items()}


def _record(kind: Callable[..., Any], readers: Mapping[str, Callable[[Any], Any]], value: Any) -> Any:
    given = _checked(dict, value)
    found = {}
    for name, read in readers.items():
        try:
            found[name] = read(given.get(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return kind(**found)


def _checked(kind: type[Result], value: Any) -> Result:
    # Not isinstance: True is no number.
    if type(value) is not kind:
        raise ValueError(f"{value!r:.100} is no {kind.__name__}")
    return value


def _decimal(value: Any) -> Decimal:
    try:
        # A number of JSON would have lost digits by now.
        found = Decimal(_checked(str, value))
    except InvalidOperation:
        found = Decimal("NaN")
    if not found.is_finite():
        raise ValueError(f"{value!r:.100} is no number")
    return found


def _time(value: Any) -> datetime:
    at = datetime.fromisoformat(_checked(str, value))
    if at.tzinfo is None:
        raise ValueError(f"{value!r:.100} has no time zone")
    return at.astimezone(UTC)


_PLAIN: Mapping[Any, Callable[[Any], Any]] = {
    Any: lambda value: value,
    str: partial(_checked, str),
    int: partial(_checked, int),
    bool: partial(_checked, bool),
    Decimal: _decimal,
    datetime: _time,
}
