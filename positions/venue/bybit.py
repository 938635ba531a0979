"""Bybit's REST API, version 5: mark prices, and with a key the account's own positions and executions.

Every call has an end: a timeout for each try, so many tries, so many bytes and pages. Callers hold no
transaction meanwhile.
"""

import hashlib
import hmac
import json
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn, Self
from urllib.parse import quote, urlsplit

import requests
import structlog
import urllib3
from pydantic import SecretStr

from positions.domain.numbers import fits
from positions.errors import VenueRefused, VenueUnavailable
from positions.settings import LOOPBACK, Settings
from positions.venue.circuit import Circuit

log = structlog.get_logger(__name__)

ANSWER_MAX_BYTES = 8_388_608
"""All tickers of a category are half a megabyte."""
PAGES_MAX = 50
POSITIONS_PER_PAGE = 200
EXECUTIONS_PER_PAGE = 100
WINDOW = timedelta(days=7)
"""The longest time that one question for executions may span."""
RECV_WINDOW_MS = "5000"
# What the venue's answer codes mean, where they do not refuse for good (its list of error codes).
_ITS_FAULT = frozenset({10000, 10016})
_TOO_MANY = frozenset({429, 10006, 10018, 10429})
_UNKNOWN_SYMBOL = 10001
BANNED_S = 600.0
"""A 403 is the answer to too many requests from one address: left alone for ten minutes, says the venue."""
PATIENCE_S = 5.0
"""The longest rest asked for that a call sits out itself."""
REST_MAX_S = 3600.0
_CURSOR_SAFE = "%:,=+/~"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tickers:
    """What the venue says that things are worth."""

    prices: Mapping[str, Decimal]
    """By symbol, in USDT; all positive. A symbol that is not listed has none."""
    at: datetime
    """The venue's time of its answer, UTC; never later than ours when it came."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """By symbol: why what was said of it cannot be a price."""


@dataclass(frozen=True, slots=True)
class _Answer:
    result: Record
    at: datetime


class _Failed(Exception):
    """A try that failed, and may be repeated."""

    def __init__(self, reason: str, rest_s: float | None = None) -> None:
        super().__init__(reason)
        self.rest_s = rest_s
        """How long the venue asks to be left alone; None where it is just broken."""


class Bybit:
    """A client. Threads may share it; a forked process needs its own."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 5,
        retries: int = 3,
        key: SecretStr | None = None,
        secret: SecretStr | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open nothing yet.

        Args:
            url: scheme and host, one that the settings allow.
            timeout_s: for a try to begin to answer; its whole body may take as long again.
            retries: further tries after the first, after 1, 2, 4, ... seconds.
            key: of the account.
            secret: signs what is asked with the key.
            sleep: waits between tries.
            clock: seconds that never go back.
        """
        self._url = url
        self._timeout_s = timeout_s
        self._retries = retries
        self._key, self._secret = key, secret
        self._sleep, self._clock = sleep, clock
        self._circuit = Circuit()
        self._lock = threading.Lock()
        self._session = requests.Session()
        # A proxy of the environment is for the world outside.
        self._session.trust_env = urlsplit(url).hostname not in LOOPBACK
        self._session.headers["User-Agent"] = "positions"

    @classmethod
    def of(cls, settings: Settings, *, retries: int | None = None) -> Self:
        """Return the client that the settings describe, with other ``retries`` if given.

        Of an invented market the account knows nothing: beside the simulator the client has no key.
        """
        real = settings.simulator != "on"
        return cls(
            settings.price_api_url,
            timeout_s=settings.price_api_timeout,
            retries=settings.price_api_retries if retries is None else retries,
            key=settings.bybit_api_key if real else None,
            secret=settings.bybit_api_secret if real else None,
        )

    @property
    def signs(self) -> bool:
        """Whether there is a key, so that the account's own records can be asked for."""
        return self._key is not None and self._secret is not None

    def close(self) -> None:
        """Close its connections."""
        self._session.close()

    def tickers(self, symbols: Collection[str]) -> Tickers:
        """Return the prices of ``symbols``, all linear contracts: mark prices, else last ones.

        One request, however many: of several symbols all of the category are asked for.

        Raises:
            VenueUnavailable: nothing is known of any of them.
        """
        if not symbols:
            raise ValueError("no symbols")
        query = {"category": "linear"}
        if len(symbols) == 1:
            query["symbol"] = next(iter(symbols))
        try:
            answer = self._get("/v5/market/tickers", query)
        except VenueRefused as refused:
            if refused.code == _UNKNOWN_SYMBOL and len(symbols) == 1:
                return Tickers({}, datetime.now(UTC))
            raise VenueUnavailable(f"refused to tell prices: {refused}") from None
        return _tickers(_records(answer.result), set(symbols), answer.at)

    def positions(self, *, symbol: str | None = None, settle_coin: str = "USDT") -> list[Record]:
        """Return the account's positions as the venue records them (docs/reference/messages, camelCase).

        Of a ``symbol`` what there is, flat or not; else all of a settle coin that are open.

        Raises:
            VenueUnavailable: not all of them are known.
            VenueRefused: a wrong key, an unknown symbol.
        """
        query = {"category": "linear", "limit": str(POSITIONS_PER_PAGE)}
        query.update({"symbol": symbol} if symbol else {"settleCoin": settle_coin})
        return self._pages("/v5/position/list", query, symbol=symbol)

    def executions(self, *, symbol: str | None = None, since: datetime, until: datetime) -> list[Record]:
        """Return the account's executions as the venue records them, both ends included, in no order.

        The venue keeps two years, and is asked for a week at a time; of a week in which there are more than
        `PAGES_MAX` pages, ask for parts.

        Raises:
            VenueUnavailable: not all of them are known.
            VenueRefused: a wrong key, an unknown symbol.
        """
        found: list[Record] = []
        for start, end in _windows(since, until):
            query = {
                "category": "linear",
                **({"symbol": symbol} if symbol else {}),
                "startTime": str(start),
                "endTime": str(end),
                "limit": str(EXECUTIONS_PER_PAGE),
            }
            found += self._pages("/v5/execution/list", query, symbol=symbol)
        return found

    def _pages(self, path: str, query: Mapping[str, str], *, symbol: str | None) -> list[Record]:
        """Return the records of all pages: a part is never taken for the whole."""
        found: list[Record] = []
        cursor = ""
        for _ in range(PAGES_MAX):
            paged = {**query, "cursor": cursor} if cursor else query
            result = self._get(path, paged, signed=True).result
            records = _records(result)
            if symbol is not None and any(each.get("symbol") != symbol for each in records):
                raise VenueUnavailable(f"{path}: asked for {symbol}, it told of another symbol")
            found += records
            following = result.get("nextPageCursor") or ""
            if not following or not records:
                return found
            if not isinstance(following, str) or following == cursor:
                raise VenueUnavailable(f"{path}: its pages do not end")
            cursor = following
        raise VenueUnavailable(f"{path}: more than {PAGES_MAX} pages")

    def _get(self, path: str, query: Mapping[str, str], *, signed: bool = False) -> _Answer:
        """Return the venue's answer, after as many tries as it takes and may."""
        for attempt in range(self._retries + 1):
            self._admit()
            try:
                answer = self._once(path, query, signed=signed)
            except _Failed as failed:
                wait_s = self._record(failed, last=attempt == self._retries, attempt=attempt)
                log.warning(
                    "venue_failed", path=path, attempt=attempt + 1, reason=str(failed), retry_in_s=wait_s
                )
                if wait_s is None:
                    raise VenueUnavailable(f"{path}: {failed}") from None
                self._sleep(wait_s)
            except VenueRefused:
                self._set(Circuit())
                raise
            else:
                self._set(Circuit())
                return answer
        raise AssertionError("unreachable")

    def _admit(self) -> None:
        with self._lock:
            now = self._clock()
            admitted = self._circuit.admit(now, try_s=2 * self._timeout_s)
            if admitted is None:
                left = self._circuit.closed_until - now
                raise VenueUnavailable(f"left alone for another {left:.0f} s after it failed")
            self._circuit = admitted

    def _record(self, failed: _Failed, *, last: bool, attempt: int) -> float | None:
        """Take a failed try into account, and return after how long to try again; None: not in this call."""
        wait_s = float(2**attempt)
        with self._lock:
            now = self._clock()
            if failed.rest_s is None:
                self._circuit = self._circuit.failed(now)
                return None if last or self._circuit.closed_until > now else wait_s
            wait_s = max(wait_s, failed.rest_s)
            if last or failed.rest_s > PATIENCE_S:
                self._circuit = self._circuit.paused(now + wait_s)
                return None
            return wait_s

    def _set(self, circuit: Circuit) -> None:
        with self._lock:
            self._circuit = circuit

    def _once(self, path: str, query: Mapping[str, str], *, signed: bool) -> _Answer:
        # Put together here, as a cursor comes encoded and is sent and signed as it came.
        text = "&".join(f"{name}={quote(value, safe=_CURSOR_SAFE)}" for name, value in query.items())
        headers = self._signature(text) if signed else {}
        deadline = time.monotonic() + 2 * self._timeout_s
        try:
            with self._session.get(
                f"{self._url}{path}?{text}",
                headers=headers,
                # Of both together; requests hands it on as it is.
                timeout=urllib3.Timeout(total=self._timeout_s),  # type: ignore[arg-type]
                allow_redirects=False,
                stream=True,
            ) as response:
                body = _body(response, deadline)
        except requests.RequestException as error:
            raise _Failed(_kind(error)) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _Failed(f"broke off: {type(error).__name__}") from None
        return _answer(response, body)

    def _signature(self, query: str) -> dict[str, str]:
        if self._key is None or self._secret is None:
            raise VenueRefused(10003, "no key is set")
        key, now = self._key.get_secret_value(), str(time.time_ns() // 1_000_000)
        signed = f"{now}{key}{RECV_WINDOW_MS}{query}".encode()
        return {
            "X-BAPI-API-KEY": key,
            "X-BAPI-TIMESTAMP": now,
            "X-BAPI-RECV-WINDOW": RECV_WINDOW_MS,
            "X-BAPI-SIGN": hmac.new(
                self._secret.get_secret_value().encode(), signed, hashlib.sha256
            ).hexdigest(),
        }


def _body(response: requests.Response, deadline: float) -> bytes:
    """Return the body, if it is short enough and comes in time: by the byte a server may take for ever."""
    body = bytearray()
    while part := response.raw.read1(65_536, decode_content=True):
        body += part
        if len(body) > ANSWER_MAX_BYTES:
            raise _Failed(f"more than {ANSWER_MAX_BYTES} bytes")
        if time.monotonic() > deadline:
            raise _Failed("too slow")
    return bytes(body)


def _answer(response: requests.Response, body: bytes) -> _Answer:
    """Return what the venue answered.

    Raises:
        _Failed: nothing that could be used.
        VenueRefused: it does not do what was asked.
    """
    received = datetime.now(UTC)
    status = response.status_code
    if status in (403, 429):
        raise _Failed(f"HTTP {status}", _rest_s(response, BANNED_S if status == 403 else PATIENCE_S))
    if status != 200:
        raise _Failed(f"HTTP {status}")
    try:
        answer = json.loads(body, parse_float=Decimal, parse_constant=_refuse_constant)
    except (ValueError, InvalidOperation, RecursionError):
        raise _Failed("not JSON") from None
    code = answer.get("retCode") if isinstance(answer, dict) else None
    if not isinstance(code, int) or isinstance(code, bool):
        raise _Failed("no answer of its API")
    reason = re.sub(r"[^\x20-\x7e]", "?", str(answer.get("retMsg"))[:200])
    if code in _TOO_MANY:
        raise _Failed(f"{code}: {reason}", _rest_s(response, 1.0))
    if code in _ITS_FAULT:
        raise _Failed(f"{code}: {reason}")
    if code:
        raise VenueRefused(code, reason)
    if not isinstance(answer.get("result"), dict):
        raise _Failed("no answer of its API")
    return _Answer(answer["result"], _time(answer.get("time"), received))


def _rest_s(response: requests.Response, default: float) -> float:
    """Return how long the venue asks to be left alone, in seconds."""
    rest = default
    after, reset = (response.headers.get(n) for n in ("Retry-After", "X-Bapi-Limit-Reset-Timestamp"))
    if after is not None:
        try:
            rest = float(after) if after.isdigit() else parsedate_to_datetime(after).timestamp() - time.time()
        except (ValueError, OverflowError):
            rest = default
    elif reset is not None and re.fullmatch("[0-9]{13}", reset):
        rest = int(reset) / 1000 - time.time()
    # At least the default: a moment that has passed says nothing, and the wait before a try comes on top.
    return min(max(rest, 0.0 if after is not None else min(default, PATIENCE_S)), REST_MAX_S)


def _kind(error: requests.RequestException) -> str:
    """Return what went wrong, without what was asked."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not to be trusted"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return type(error).__name__


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _time(value: object, received: datetime) -> datetime:
    if isinstance(value, int) and 0 < value < 10**13:
        return min(datetime.fromtimestamp(value / 1000, UTC), received)
    return received


def _records(result: Record) -> list[Record]:
    records = result.get("list")
    if not isinstance(records, list) or not all(isinstance(each, dict) for each in records):
        raise VenueUnavailable("its answer has no list of records")
    return records


def _tickers(records: Collection[Record], wanted: set[str], at: datetime) -> Tickers:
    prices: dict[str, Decimal] = {}
    refused: dict[str, str] = {}
    for record in records:
        symbol = record.get("symbol")
        if symbol not in wanted:
            continue
        mark = record.get("markPrice")
        text = mark if mark not in (None, "") else record.get("lastPrice")
        price = _price(text)
        if price is None:
            refused[symbol] = f"{str(text)[:40]!r} is no price"
        elif prices.setdefault(symbol, price) != price:
            refused[symbol] = "two prices in one answer"
    return Tickers({each: prices[each] for each in prices if each not in refused}, at, refused)


def _price(value: object) -> Decimal | None:
    """Return a price, or None for what cannot be one: it is positive, and fits the columns."""
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        return None
    try:
        price = Decimal(value)
    except InvalidOperation:
        return None
    return price if fits(price) and price > 0 else None


def _windows(since: datetime, until: datetime) -> Iterator[tuple[int, int]]:
    """Yield first and last millisecond of each question, of a week at most, that together span the time."""
    start, last, span = (
        each // timedelta(milliseconds=1) for each in (since - _EPOCH, until - _EPOCH, WINDOW)
    )
    while start <= last:
        end = min(start + span - 1, last)
        yield start, end
        start = end + 1
