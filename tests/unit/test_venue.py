"""The client of the exchange's API, against a server that behaves like it, failures included."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from positions.errors import VenueError, VenueRefused, VenueUnavailable
from positions.settings import SettingsError, load
from positions.venue import bybit
from positions.venue.bybit import Bybit
from positions.venue.circuit import FIRST_S, LONGEST_S, OPENS_AFTER, Circuit
from tests.venue import DRIPS, DROPS, HANGS, KEY, SECRET, Reply, Venue, now_ms, refusal

TRY_S = 0.3


class Clock:
    """A clock that only waits move on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def venue() -> Iterator[Venue]:
    with Venue() as made:
        made.prices.update(BTCUSDT="50000.5", ETHUSDT="3000")
        yield made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(venue: Venue, clock: Clock) -> Iterator[Bybit]:
    made = client_of(venue, clock)
    yield made
    made.close()


def client_of(venue: Venue, clock: Clock, *, secret: str = SECRET, retries: int = 3) -> Bybit:
    return Bybit(
        venue.url,
        timeout_s=TRY_S,
        retries=retries,
        key=SecretStr(KEY),
        secret=SecretStr(secret),
        sleep=clock.sleep,
        clock=clock,
    )


def answer(**fields: Any) -> Reply:
    return Reply(body=json.dumps({"retCode": 0, "retMsg": "OK", "time": now_ms(), **fields}).encode())


def test_one_price_is_asked_for_by_symbol_and_keeps_every_digit(venue: Venue, client: Bybit) -> None:
    venue.prices["1000PEPEUSDT"] = "0.010000000000000001"
    before = datetime.now(UTC)
    found = client.tickers(["1000PEPEUSDT"])
    assert found.prices == {"1000PEPEUSDT": Decimal("0.010000000000000001")}
    assert before - timedelta(milliseconds=1) <= found.at <= datetime.now(UTC)
    assert venue.requests == ["/v5/market/tickers?category=linear&symbol=1000PEPEUSDT"]


def test_many_prices_are_one_request_and_those_not_listed_are_left_out(venue: Venue, client: Bybit) -> None:
    wanted = ["BTCUSDT", "ETHUSDT", "GONEUSDT"]
    assert client.tickers(wanted).prices == {"BTCUSDT": Decimal("50000.5"), "ETHUSDT": Decimal(3000)}
    assert venue.requests == ["/v5/market/tickers?category=linear"]


def test_a_symbol_that_is_not_listed_has_no_price_and_is_no_failure(
    venue: Venue, client: Bybit, clock: Clock
) -> None:
    for _ in range(OPENS_AFTER + 1):
        assert client.tickers(["GONEUSDT"]).prices == {}
    assert len(venue.requests) == OPENS_AFTER + 1
    assert clock.waits == []


def test_without_a_mark_price_the_last_price_is_taken(venue: Venue, client: Bybit) -> None:
    venue.tickers = lambda tickers: [{**each, "markPrice": "", "lastPrice": "7"} for each in tickers]
    assert client.tickers(["BTCUSDT"]).prices == {"BTCUSDT": Decimal(7)}


@pytest.mark.parametrize(
    "price", ["-1", "0", "NaN", "Infinity", "1e30", "dear", None, True, [], "0.0000000000000000001"]
)
def test_what_cannot_be_a_price_is_refused_and_its_neighbour_taken(
    venue: Venue, client: Bybit, price: object
) -> None:
    venue.tickers = lambda tickers: [
        {**each, "markPrice": price, "lastPrice": price} if each["symbol"] == "BTCUSDT" else each
        for each in tickers
    ]
    found = client.tickers(["BTCUSDT", "ETHUSDT"])
    assert found.prices == {"ETHUSDT": Decimal(3000)}
    assert found.refused.keys() == {"BTCUSDT"}


def test_a_negative_mark_price_is_not_replaced_by_the_last_price(venue: Venue, client: Bybit) -> None:
    venue.tickers = lambda tickers: [{**each, "markPrice": "-5", "lastPrice": "5"} for each in tickers]
    assert client.tickers(["BTCUSDT"]).prices == {}


def test_the_price_of_another_symbol_is_nobodys(venue: Venue, client: Bybit) -> None:
    venue.tickers = lambda tickers: [{**each, "symbol": "ETHUSDT"} for each in tickers]
    assert client.tickers(["BTCUSDT"]).prices == {}


def test_two_prices_for_one_symbol_are_none(venue: Venue, client: Bybit) -> None:
    venue.tickers = lambda tickers: [*tickers, {**tickers[0], "markPrice": "1"}]
    found = client.tickers(["BTCUSDT", "ETHUSDT"])
    assert found.prices.keys() == {"ETHUSDT"}
    assert found.refused.keys() == {"BTCUSDT"}


def test_the_time_is_the_venues_unless_it_is_ahead(venue: Venue, client: Bybit) -> None:
    venue.time_ms = lambda: 1_736_935_200_123
    assert client.tickers(["BTCUSDT"]).at == datetime(2025, 1, 15, 10, 0, 0, 123000, tzinfo=UTC)
    venue.time_ms = lambda: now_ms() + 86_400_000
    assert client.tickers(["BTCUSDT"]).at <= datetime.now(UTC)


FAILURES = {
    "hangs": (HANGS, "no answer in time"),
    "drips": (DRIPS, "too slow"),
    "drops": (DROPS, "no connection"),
    "broken": (Reply(status=500, body=b"<html>"), "HTTP 500"),
    "redirects": (Reply(status=302, headers={"Location": "http://127.0.0.1:1/"}), "HTTP 302"),
    "bad JSON": (Reply(body=b'{"retCode": 0, "result"'), "not JSON"),
    "not UTF-8": (Reply(body=b'{"retCode": \xff'), "not JSON"),
    "NaN": (Reply(body=b'{"retCode": 0, "result": {"list": []}, "time": NaN}'), "not JSON"),
    "too deep": (Reply(body=b"[" * 200_000), "not JSON"),
    "another API": (Reply(body=b'{"ok": true}'), "no answer of its API"),
    "no result": (answer(result=None), "no answer of its API"),
    "too long": (Reply(body=b" " * (bybit.ANSWER_MAX_BYTES + 1)), "more than 8388608 bytes"),
    "its timeout": (refusal(10000, "Server Timeout"), "10000: Server Timeout"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_tried_again_after_1_2_and_4_seconds(
    venue: Venue, client: Bybit, clock: Clock, name: str
) -> None:
    reply, reason = FAILURES[name]
    venue.fails.extend([reply] * 3)
    assert client.tickers(["BTCUSDT"]).prices == {"BTCUSDT": Decimal("50000.5")}
    assert clock.waits == [1, 2, 4]
    venue.fails.extend([reply] * 4)
    with pytest.raises(VenueUnavailable, match=reason):
        client.tickers(["BTCUSDT"])


def test_a_list_that_is_none_is_no_answer(venue: Venue, client: Bybit) -> None:
    for nonsense in (None, "x", ["x"]):
        venue.fails.append(answer(result={"list": nonsense}))
        with pytest.raises(VenueUnavailable, match="no list"):
            client.tickers(["BTCUSDT"])


def test_a_dead_host_is_left_alone_then_tried_once_and_found_again(
    venue: Venue, client: Bybit, clock: Clock
) -> None:
    venue.always = Reply(status=502)
    with pytest.raises(VenueUnavailable, match="HTTP 502"):
        client.tickers(["BTCUSDT"])
    assert len(venue.requests) == OPENS_AFTER
    for _ in range(5):
        with pytest.raises(VenueUnavailable, match="left alone for another 30 s"):
            client.tickers(["BTCUSDT"])
    assert len(venue.requests) == OPENS_AFTER
    clock.now += FIRST_S
    with pytest.raises(VenueUnavailable, match="HTTP 502"):
        client.tickers(["BTCUSDT"])
    assert len(venue.requests) == OPENS_AFTER + 1
    with pytest.raises(VenueUnavailable, match="left alone for another 60 s"):
        client.tickers(["BTCUSDT"])
    venue.always = None
    clock.now += 2 * FIRST_S
    assert client.tickers(["BTCUSDT"]).prices
    assert client.tickers(["BTCUSDT"]).prices


def test_nobody_listens_then_somebody_does(venue: Venue, client: Bybit, clock: Clock) -> None:
    assert client.tickers(["BTCUSDT"]).prices
    venue.stop()
    with pytest.raises(VenueUnavailable, match="no connection"):
        client.tickers(["BTCUSDT"])
    venue.start()
    clock.now += FIRST_S
    assert client.tickers(["BTCUSDT"]).prices


LIMITS: dict[str, Callable[[], Reply]] = {
    "too many visits, reset soon": lambda: refusal(
        10006, "Too many visits!", X_Bapi_Limit_Reset_Timestamp=str(now_ms() + 2500)
    ),
    "HTTP 429, retry after": lambda: Reply(status=429, headers={"Retry-After": "3"}),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_short_rest_that_the_venue_asks_for_is_sat_out(
    venue: Venue, client: Bybit, clock: Clock, name: str
) -> None:
    venue.fails.append(LIMITS[name]())
    assert client.tickers(["BTCUSDT"]).prices
    (wait,) = clock.waits
    assert 2 <= wait <= 3


LONG_LIMITS: dict[str, tuple[Callable[[], Reply], int]] = {
    "HTTP 403": (lambda: Reply(status=403, body=b"access too frequent"), 600),
    "HTTP 429": (lambda: Reply(status=429, headers={"Retry-After": "90"}), 90),
    "HTTP 429, far too long": (lambda: Reply(status=429, headers={"Retry-After": "999999999"}), 3600),
    "too many visits": (
        lambda: refusal(10006, "Too many visits!", X_Bapi_Limit_Reset_Timestamp=str(now_ms() + 60_500)),
        60,
    ),
}


@pytest.mark.parametrize("name", LONG_LIMITS)
def test_after_a_long_one_it_is_asked_again_at_its_end_and_not_before(
    venue: Venue, client: Bybit, clock: Clock, name: str
) -> None:
    reply, rest_s = LONG_LIMITS[name]
    venue.fails.append(reply())
    with pytest.raises(VenueUnavailable):
        client.tickers(["BTCUSDT"])
    assert clock.waits == []
    clock.now += rest_s - 1
    with pytest.raises(VenueUnavailable, match="left alone"):
        client.tickers(["BTCUSDT"])
    assert len(venue.requests) == 1
    clock.now += 2
    assert client.tickers(["BTCUSDT"]).prices


@pytest.mark.parametrize("said", ["soon", "-5", "²", "Wed, 99 Foo 2026 00:00:00 GMT"])
def test_a_rest_that_cannot_be_read_is_one_all_the_same(
    venue: Venue, client: Bybit, clock: Clock, said: str
) -> None:
    venue.fails.append(Reply(status=429, headers={"Retry-After": said.encode().decode("latin-1")}))
    assert client.tickers(["BTCUSDT"]).prices
    assert clock.waits == [bybit.PATIENCE_S]


def position(symbol: str, size: str = "1") -> dict[str, Any]:
    return {"symbol": symbol, "size": size, "side": "Buy", "positionIdx": 0, "avgPrice": "5"}


def fill(number: int, at: datetime, symbol: str = "BTCUSDT") -> dict[str, Any]:
    return {"execId": f"e{number}", "symbol": symbol, "execTime": str(int(at.timestamp() * 1000))}


def test_positions_of_all_pages_as_the_venue_records_them(venue: Venue, client: Bybit) -> None:
    venue.positions = [position(f"A{number}USDT") for number in range(7)]
    venue.positions += [position("FLATUSDT", "0"), position("XPERP")]
    venue.page = 3
    assert client.positions() == venue.positions[:7]
    assert len(venue.requests) == 3
    assert client.positions(symbol="FLATUSDT") == [position("FLATUSDT", "0")]
    assert client.positions(symbol="NONEUSDT") == []


def test_executions_of_three_weeks_are_asked_for_by_the_week(venue: Venue, client: Bybit) -> None:
    until = datetime(2026, 11, 1, 12, 30, 15, 999000, tzinfo=UTC)
    since = until - timedelta(days=21)
    ats = [since, since + timedelta(days=7), since + timedelta(days=7, milliseconds=-1), until]
    venue.executions = [fill(number, at) for number, at in enumerate(ats)]
    venue.executions += [fill(8, since - timedelta(milliseconds=1)), fill(9, until, "ETHUSDT")]
    venue.page = 1
    found = client.executions(symbol="BTCUSDT", since=since, until=until)
    assert sorted(each["execId"] for each in found) == ["e0", "e1", "e2", "e3"]
    both = client.executions(since=until, until=until)
    assert sorted(each["execId"] for each in both) == ["e3", "e9"]


def test_a_part_of_the_pages_is_never_the_whole(venue: Venue, client: Bybit) -> None:
    venue.page = 1
    venue.positions = [position(f"A{number}USDT") for number in range(bybit.PAGES_MAX)]
    assert len(client.positions()) == bybit.PAGES_MAX
    venue.positions.append(position("ONEMOREUSDT"))
    with pytest.raises(VenueUnavailable, match="more than 50 pages"):
        client.positions()
    endless = answer(result={"list": [position("AUSDT")], "nextPageCursor": "again"})
    venue.always = endless
    with pytest.raises(VenueUnavailable, match="do not end"):
        client.positions()


def test_records_of_another_symbol_are_not_taken(venue: Venue, client: Bybit) -> None:
    venue.always = answer(result={"list": [position("ETHUSDT")], "nextPageCursor": ""})
    with pytest.raises(VenueUnavailable, match="another symbol"):
        client.positions(symbol="BTCUSDT")


def test_a_wrong_secret_is_refused_at_once_and_told_nowhere(venue: Venue, clock: Clock) -> None:
    client = client_of(venue, clock, secret="not-the-secret")
    with pytest.raises(VenueRefused, match="10004") as caught:
        client.positions()
    assert len(venue.requests) == 1
    assert "not-the-secret" not in repr((caught.value, vars(client), venue.requests))
    client.close()


def test_without_a_key_nothing_private_is_asked(venue: Venue) -> None:
    client = Bybit(venue.url)
    assert not client.signs
    with pytest.raises(VenueRefused, match="no key"):
        client.positions()
    assert venue.requests == []


def test_a_message_of_the_venue_is_one_short_line(venue: Venue, client: Bybit) -> None:
    venue.fails.append(refusal(10005, "Permission denied\n\x1b[31m" + "x" * 5000))
    with pytest.raises(VenueError) as caught:
        client.positions()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "url",
    [
        "https://api.bybit.com",
        "https://api.bybit.com/",
        "https://api.bybit.com:443",
        "https://api-testnet.bybit.com",
        "http://127.0.0.1:9999",
        "http://localhost:9999/",
        "http://[::1]:9999",
    ],
)
def test_the_venues_hosts_and_this_machine_are_allowed(url: str) -> None:
    assert load({"POSITION_MANAGER_PRICE_API_URL": url}).price_api_url == url.rstrip("/").removesuffix(":443")


@pytest.mark.parametrize(
    "url",
    [
        "http://api.bybit.com",
        "https://api.bybit.com.evil.example",
        "https://evil.example/api.bybit.com",
        "https://api.bybit.com@evil.example",
        "https://user:pass@api.bybit.com",
        "https://api.bybit.com:8443",
        "https://api.bybit.com/v5",
        "https://evil.example\\@api.bybit.com",
        "http://169.254.169.254",
        "http://127.0.0.1:99999999",
        "file:///etc/passwd",
        "api.bybit.com",
    ],
)
def test_any_other_host_is_a_wrong_setting(url: str) -> None:
    with pytest.raises(SettingsError, match="POSITION_MANAGER_PRICE_API_URL") as caught:
        load({"POSITION_MANAGER_PRICE_API_URL": url})
    assert "pass" not in str(caught.value)


def test_a_key_without_its_secret_is_a_wrong_setting() -> None:
    with pytest.raises(SettingsError, match="BYBIT_API_SECRET"):
        load({"POSITION_MANAGER_BYBIT_API_KEY": "k"})
    made = Bybit.of(load({"POSITION_MANAGER_BYBIT_API_KEY": "k", "POSITION_MANAGER_BYBIT_API_SECRET": "s"}))
    assert made.signs


@given(st.lists(st.tuples(st.floats(0, 200), st.booleans()), max_size=60))
def test_a_dead_host_is_asked_ever_less_often_and_a_live_one_always(steps: list[tuple[float, bool]]) -> None:
    circuit, now, in_a_row, asked_at = Circuit(), 0.0, 0, -1e9
    for wait, works in steps:
        now += wait
        admitted = circuit.admit(now, try_s=10)
        if in_a_row < OPENS_AFTER:
            assert admitted is not None
        else:
            assert (admitted is not None) == (
                now - asked_at >= min(FIRST_S * 2 ** (in_a_row - OPENS_AFTER), LONGEST_S)
            )
        if admitted is None:
            continue
        if in_a_row >= OPENS_AFTER:
            assert admitted.admit(now, try_s=10) is None
        asked_at = now
        in_a_row = 0 if works else in_a_row + 1
        circuit = Circuit() if works else admitted.failed(now)
