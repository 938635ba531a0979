"""Prices from the exchange's API: what is priced, what is not believed, and that no event waits for them."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from sqlalchemy import Engine, func, select

from beat_schedule import TASK_QUEUE
from positions.domain.events import Mode, PositionKey
from positions.domain.position import Mark
from positions.errors import VenueUnavailable
from positions.handlers import refresh_prices as module
from positions.handlers.rebuild_position import rebuild_position
from positions.handlers.refresh_prices import BATCH, CONFIRM_S, refresh_prices
from positions.handlers.update_marks import update_marks
from positions.settings import load
from positions.storage import positions as store
from positions.storage.database import Retry, transaction
from positions.storage.tables import ledger, outbox
from positions.tasks import prices, resources
from positions.tasks.resources import Resources
from positions.venue.bybit import Bybit
from positions.venue.circuit import FIRST_S
from tests.integration.api import KEY, Make
from tests.integration.processes import beat, environment, jobs, worker
from tests.integration.support import EXECUTION_QUEUE, RULES, apply, execution, publish, stored
from tests.services import wait_until
from tests.venue import HANGS, Reply, Venue, now_ms

BTC, ETH, SOL = (PositionKey(f"{coin}USDT", Mode.ONE_WAY) for coin in ("BTC", "ETH", "SOL"))
HEDGED = PositionKey("BTCUSDT", Mode.HEDGE)


class Clock:
    """What a client and a handler wait by; what waits is told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def venue() -> Iterator[Venue]:
    with Venue() as made:
        made.prices.update(BTCUSDT="105.5", ETHUSDT="11")
        yield made


@pytest.fixture
def client(venue: Venue, clock: Clock) -> Iterator[Bybit]:
    made = Bybit(venue.url, timeout_s=0.3, sleep=clock.sleep, clock=clock)
    yield made
    made.close()


@pytest.fixture
def api(make_app: Make, database_url: str) -> FlaskClient:
    made = make_app(database_url).test_client()
    made.environ_base["HTTP_X_API_KEY"] = KEY
    return made


def refresh(engine: Engine, client: Bybit, clock: Clock) -> dict[str, int]:
    due_before = datetime.now(UTC) - RULES.price_stale_after
    counts = refresh_prices(
        engine, client, rules=RULES, retry=Retry(), due_before=due_before, sleep=clock.sleep
    )
    return {name: count for name, count in counts.items() if count}


def report(
    asset: str, mark: str, age: timedelta, size: str = "1", now: datetime | None = None
) -> dict[str, Any]:
    """Return an exchange report with a mark price."""
    at = (now or datetime.now(UTC)) - age
    record = {"symbol": asset, "side": "Buy", "size": size, "avgPrice": mark, "markPrice": mark, "mode": 0}
    return {"event_type": "position", "data": {**record, "timestamp": at.isoformat()}}


def hold(engine: Engine) -> None:
    """Hold BTC and ETH, bought now at 100 and 10, without a price."""
    now = datetime.now(UTC).isoformat()
    apply(engine, [execution("BTCUSDT", "Buy", "2", "100", executed_at=now)])
    apply(engine, [execution("ETHUSDT", "Sell", "3", "10", executed_at=now)])


def price_of(engine: Engine, key: PositionKey = BTC) -> tuple[Decimal | None, str | None]:
    row = stored(engine)[key]
    return row["current_price"], row["current_price_source"]


def test_positions_without_a_price_are_priced_in_one_request(
    engine: Engine, venue: Venue, client: Bybit, clock: Clock, api: FlaskClient
) -> None:
    hold(engine)
    assert api.get("/api/v1/portfolio").get_json()["unpriced_assets"] == ["BTCUSDT", "ETHUSDT"]
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    assert refresh(engine, client, clock) == {"due": 2, "priced": 2}
    assert len(venue.requests) == 1
    found = api.get("/api/v1/positions/BTCUSDT").get_json()
    assert (found["current_price"], found["current_price_source"]) == ("105.5", "price_api")
    assert before <= datetime.fromisoformat(found["current_price_at"]) <= datetime.now(UTC)
    assert (found["price_is_stale"], found["unrealized_pnl"], found["version"]) == (False, "11", 2)
    portfolio = api.get("/api/v1/portfolio").get_json()
    assert portfolio["total_exposure_usdt"] == "244"
    assert portfolio["unpriced_assets"] == portfolio["stale_assets"] == []
    with engine.connect() as connection:
        bodies = connection.execute(select(outbox.c.body).order_by(outbox.c.id)).scalars().all()
    sources = [json.loads(body)["update_source"] for body in bodies]
    assert sources == ["order_execution", "order_execution", "price_refresh", "price_refresh"]


def test_a_fresh_price_and_a_closed_position_are_left_alone(
    engine: Engine, venue: Venue, client: Bybit, clock: Clock
) -> None:
    apply(engine, [report("BTCUSDT", "100", timedelta(seconds=290))])
    apply(engine, [execution("ETHUSDT", side, "3", "10", number=n) for n, side in enumerate(("Buy", "Sell"))])
    assert refresh(engine, client, clock) == {}
    assert venue.requests == []


def test_a_stale_price_is_refreshed_and_a_newer_report_wins_again(
    engine: Engine, client: Bybit, clock: Clock
) -> None:
    apply(engine, [report("BTCUSDT", "100", timedelta(seconds=310))])
    assert refresh(engine, client, clock) == {"due": 1, "priced": 1}
    assert price_of(engine) == (Decimal("105.5"), "price_api")
    apply(engine, [report("BTCUSDT", "101", timedelta(seconds=200))])
    assert price_of(engine) == (Decimal("105.5"), "price_api")
    apply(engine, [report("BTCUSDT", "102", timedelta(seconds=-1))])
    assert price_of(engine) == (102, "report")


def test_both_modes_of_an_asset_have_its_price(engine: Engine, client: Bybit, clock: Clock) -> None:
    hold(engine)
    legs = [("Buy", 1, "4"), ("Sell", 2, "4")]
    now = datetime.now(UTC).isoformat()
    for number, (side, index, size) in enumerate(legs):
        fill = execution("BTCUSDT", side, size, "100", number=7 + number, executed_at=now)
        apply(engine, [{**fill, "position_idx": index}])
    # Level in hedge mode: a size of 0, and open all the same.
    assert stored(engine)[HEDGED]["size"] == 0
    assert refresh(engine, client, clock) == {"due": 3, "priced": 3}
    assert price_of(engine, HEDGED) == price_of(engine, BTC) == (Decimal("105.5"), "price_api")


def test_what_is_not_listed_keeps_its_last_price_and_holds_up_nobody(
    engine: Engine, client: Bybit, clock: Clock, api: FlaskClient
) -> None:
    hold(engine)
    apply(engine, [report("GONEUSDT", "7", timedelta(hours=1)), report("SOLUSDT", "7", timedelta(hours=1))])
    apply(engine, [execution("NEVERUSDT", "Buy", "1", "1")])
    assert refresh(engine, client, clock) == {"due": 5, "priced": 2, "unlisted": 3}
    portfolio = api.get("/api/v1/portfolio").get_json()
    assert portfolio["unpriced_assets"] == ["NEVERUSDT"]
    assert portfolio["stale_assets"] == ["GONEUSDT", "SOLUSDT"]
    assert api.get("/api/v1/positions/GONEUSDT").get_json()["current_price"] == "7"


@pytest.mark.parametrize("lie", ["-105", "0", "", "NaN", "1e40"])
def test_a_price_that_is_none_changes_nothing(
    engine: Engine, venue: Venue, client: Bybit, clock: Clock, lie: str
) -> None:
    hold(engine)
    apply(engine, [report("BTCUSDT", "100", timedelta(hours=1))])
    before = stored(engine)[BTC]
    venue.prices["BTCUSDT"] = lie
    assert refresh(engine, client, clock) == {"due": 2, "priced": 1, "refused": 1}
    assert stored(engine)[BTC] == before
    assert price_of(engine, ETH) == (11, "price_api")


def test_the_price_of_another_symbol_changes_nothing(
    engine: Engine, venue: Venue, client: Bybit, clock: Clock
) -> None:
    apply(engine, [report("BTCUSDT", "100", timedelta(hours=1))])
    venue.tickers = lambda tickers: [{**each, "symbol": "ETHUSDT"} for each in tickers]
    assert refresh(engine, client, clock) == {"due": 1, "unlisted": 1}
    assert price_of(engine) == (100, "report")


@pytest.mark.parametrize("lie", ["0.000105", "10500000"])
def test_an_absurd_jump_that_a_second_reading_denies_changes_nothing(
    engine: Engine, venue: Venue, client: Bybit, clock: Clock, lie: str
) -> None:
    hold(engine)
    apply(engine, [report("BTCUSDT", "100", timedelta(hours=1))])
    venue.prices["BTCUSDT"] = lie
    clock.meanwhile = lambda: venue.prices.update(BTCUSDT="105")
    assert refresh(engine, client, clock) == {"due": 2, "priced": 1, "doubted": 1}
    assert price_of(engine) == (100, "report")
    # What it denied with is taken in the next run.
    assert refresh(engine, client, clock) == {"due": 1, "priced": 1}
    assert price_of(engine) == (105, "price_api")


def test_a_jump_is_taken_when_a_second_reading_confirms_it(
    engine: Engine, venue: Venue, client: Bybit, clock: Clock
) -> None:
    apply(engine, [report("BTCUSDT", "100", timedelta(hours=1))])
    venue.prices["BTCUSDT"] = "60"
    assert refresh(engine, client, clock) == {"due": 1, "priced": 1}
    assert clock.waits == [CONFIRM_S]
    assert len(venue.requests) == 2
    assert price_of(engine) == (60, "price_api")


def test_the_same_answer_again_or_none_confirms_nothing(
    engine: Engine, venue: Venue, client: Bybit, clock: Clock
) -> None:
    apply(engine, [report("BTCUSDT", "100", timedelta(hours=1))])
    venue.prices["BTCUSDT"] = "60"
    cached = now_ms()
    venue.time_ms = lambda: cached
    assert refresh(engine, client, clock) == {"due": 1, "doubted": 1}
    venue.time_ms = now_ms
    clock.meanwhile = lambda: setattr(venue, "always", Reply(status=500))
    assert refresh(engine, client, clock) == {"due": 1, "doubted": 1}
    assert price_of(engine) == (100, "report")


def test_a_first_price_is_measured_by_what_was_paid(
    engine: Engine, venue: Venue, client: Bybit, clock: Clock
) -> None:
    hold(engine)
    venue.prices["BTCUSDT"] = "1"
    clock.meanwhile = lambda: venue.prices.update(BTCUSDT="99")
    assert refresh(engine, client, clock) == {"due": 2, "priced": 1, "doubted": 1}
    assert price_of(engine) == (None, None)


def test_a_price_of_more_than_a_day_ago_says_nothing_of_todays(
    engine: Engine, venue: Venue, client: Bybit, clock: Clock
) -> None:
    apply(engine, [report("BTCUSDT", "100", timedelta(hours=25))])
    venue.prices["BTCUSDT"] = "5"
    assert refresh(engine, client, clock) == {"due": 1, "priced": 1}
    assert clock.waits == []


def test_the_host_dies_the_last_price_stays_and_is_stale_and_it_comes_back(
    engine: Engine, venue: Venue, client: Bybit, clock: Clock, api: FlaskClient
) -> None:
    apply(engine, [report("BTCUSDT", "100", timedelta(hours=1))])
    venue.stop()
    with pytest.raises(VenueUnavailable, match="no connection"):
        refresh(engine, client, clock)
    with pytest.raises(VenueUnavailable, match="left alone"):
        refresh(engine, client, clock)
    found = api.get("/api/v1/positions/BTCUSDT").get_json()
    assert (found["current_price"], found["current_price_source"]) == ("100", "report")
    assert (found["price_is_stale"], found["version"]) == (True, 1)
    assert api.get("/api/v1/portfolio").get_json()["stale_assets"] == ["BTCUSDT"]
    venue.start()
    clock.now += FIRST_S
    assert refresh(engine, client, clock) == {"due": 1, "priced": 1}
    found = api.get("/api/v1/positions/BTCUSDT").get_json()
    assert (found["current_price"], found["price_is_stale"]) == ("105.5", False)


def test_a_rate_limit_that_ends_soon_is_sat_out_and_a_long_one_is_not(
    engine: Engine, venue: Venue, client: Bybit, clock: Clock
) -> None:
    hold(engine)
    venue.fails.append(Reply(status=403, body=b"access too frequent"))
    with pytest.raises(VenueUnavailable):
        refresh(engine, client, clock)
    for _ in range(9):
        clock.now += 60
        with pytest.raises(VenueUnavailable, match="left alone"):
            refresh(engine, client, clock)
    assert len(venue.requests) == 1
    clock.now += 61
    venue.fails.append(Reply(status=429, headers={"Retry-After": "2"}))
    assert refresh(engine, client, clock) == {"due": 2, "priced": 2}


def test_an_event_is_applied_while_the_host_hangs(
    engine: Engine, venue: Venue, client: Bybit, clock: Clock
) -> None:
    hold(engine)
    venue.fails.append(HANGS)
    slow = Bybit(venue.url, timeout_s=60, retries=0, sleep=clock.sleep, clock=clock)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(refresh, engine, slow, clock)
        assert venue.asked.acquire(timeout=30)
        apply(engine, [execution("BTCUSDT", "Buy", "1", "103", number=5)], Retry(retries=0))
        with engine.connect() as connection:
            busy = connection.exec_driver_sql(
                "SELECT count(*) FROM pg_stat_activity WHERE xact_start IS NOT NULL"
                " AND datname = current_database() AND pid <> pg_backend_pid()"
            ).scalar_one()
        assert busy == 0
        assert not running.done()
        venue.stop()
        with pytest.raises(VenueUnavailable):
            running.result(30)
    slow.close()
    assert stored(engine)[BTC]["size"] == 3
    venue.start()
    assert refresh(engine, client, clock) == {"due": 2, "priced": 2}
    assert stored(engine)[BTC]["size"] == 3


def test_events_are_applied_while_workers_of_jobs_wait_for_the_exchange(
    engine: Engine, venue: Venue, database_url: str, broker_url: str, redis_url: str, tmp_path: Path
) -> None:
    """The whole way, by real processes: beat, the job, the exchange, the position; and events beside it."""
    env = environment(
        database_url,
        broker_url,
        redis_url,
        price_api_url=venue.url,
        price_api_timeout="30",
        price_api_retries="0",
        price_staleness_threshold="5",
        worker_concurrency="1",
    )
    hold(engine)
    venue.fails.append(HANGS)
    with jobs(env, tmp_path), worker(env, tmp_path, "-Q", TASK_QUEUE), beat(env, tmp_path / "beat"):
        assert venue.asked.acquire(timeout=60)
        publish(broker_url, [(EXECUTION_QUEUE, execution("BTCUSDT", "Buy", "1", "103", number=5))])
        assert wait_until(lambda: stored(engine)[BTC]["size"] == 3, limit_s=25)
        assert price_of(engine) == (None, None)
        venue.stop()
        venue.start()
        assert wait_until(lambda: price_of(engine) == (Decimal("105.5"), "price_api"), limit_s=60)
    assert stored(engine)[BTC]["size"] == 3


def test_nothing_real_is_mixed_into_an_invented_market(
    engine: Engine, venue: Venue, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(engine)
    env = {
        "POSITION_MANAGER_DATABASE_URL": database_url,
        "POSITION_MANAGER_PRICE_API_URL": venue.url,
        "POSITION_MANAGER_BYBIT_API_KEY": "k",
        "POSITION_MANAGER_BYBIT_API_SECRET": "s",
    }
    invented = Resources(load({**env, "POSITION_MANAGER_SIMULATOR": "on"}))
    monkeypatch.setattr(resources, "current", lambda: invented)
    assert prices.refresh() == {}
    assert not venue.requests
    assert not invented.venue.signs
    real = Resources(load(env))
    monkeypatch.setattr(resources, "current", lambda: real)
    assert prices.refresh() == {"due": 2, "priced": 2}
    assert real.venue.signs
    real.engine.dispose()


def test_500_positions_are_priced_in_25_transactions(
    engine: Engine, venue: Venue, client: Bybit, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = [f"A{number:03}USDT" for number in range(500)]
    now = datetime.now(UTC).isoformat()
    apply(engine, [execution(asset, "Buy", "1", "10", executed_at=now) for asset in assets])
    venue.prices.update(dict.fromkeys(assets, "11"))
    begun: list[int] = []

    def counted(*arguments: Any, **named: Any) -> dict[PositionKey, bool]:
        begun.append(len(named["marks"]))
        return update_marks(*arguments, **named)

    monkeypatch.setattr(module, "update_marks", counted)
    assert refresh(engine, client, clock) == {"due": 500, "priced": 500}
    assert begun == [BATCH] * 25
    assert len(venue.requests) == 1
    assert {row["current_price"] for row in stored(engine).values()} == {11}


def test_prices_wait_for_no_event_and_come_to_a_busy_position_later(
    engine: Engine, client: Bybit, clock: Clock
) -> None:
    hold(engine)
    apply(engine, [report("BTCUSDT", "100", timedelta(hours=1))])
    with transaction(engine) as other:
        store.lock(other, [BTC])
        # Were it to wait for the lock, it would wait for this very test.
        assert refresh(engine, client, clock) == {"due": 2, "priced": 1, "busy": 1}
    assert [round(wait, 1) for wait in clock.waits] == [0.1, 0.2, 0.4]
    assert price_of(engine, ETH) == (11, "price_api")
    assert refresh(engine, client, clock) == {"due": 1, "priced": 1}


def test_two_refreshes_at_once_price_each_position_once(engine: Engine, venue: Venue) -> None:
    hold(engine)
    asked = threading.Barrier(2)
    real = Bybit.tickers

    class Together(Bybit):
        def tickers(self, symbols: Any) -> Any:
            told = real(self, symbols)
            asked.wait(30)
            return told

    clients = [Together(venue.url) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda each: refresh(engine, each, Clock()), clients))
    assert sum((Counter(each) for each in found), Counter())["priced"] == 2
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(outbox)).scalar_one() == 4


def test_a_price_that_is_no_newer_is_not_taken_and_none_is_lost_by_a_late_fill(engine: Engine) -> None:
    hold(engine)
    at = datetime.now(UTC)
    with transaction(engine) as connection:
        mark = Mark(price=Decimal(105), at=at, source="price_api")
        assert update_marks(connection, {BTC: mark}, rules=RULES, now=at) == {BTC: True}
        older = Mark(price=Decimal(104), at=at, source="price_api")
        assert update_marks(connection, {BTC: older}, rules=RULES, now=at) == {BTC: False}
        # Another run was faster, and its price is fresh.
        newer, due = replace(mark, at=at + timedelta(seconds=1)), at - timedelta(seconds=300)
        found = update_marks(connection, {BTC: newer}, rules=RULES, now=at, due_before=due)
        assert found == {BTC: False}
    # Before all others: folded anew from the ledger.
    early = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    apply(engine, [execution("BTCUSDT", "Buy", "1", "90", number=8, executed_at=early)])
    assert stored(engine)[BTC]["size"] == 3
    assert price_of(engine) == (105, "price_api")
    with transaction(engine) as connection:
        assert rebuild_position(connection, BTC, rules=RULES, now=at, repair=False) == {}


def test_reports_and_prices_end_the_same_in_any_order(engine: Engine) -> None:
    """Each order for an asset of its own; the newest is the report's or the API's."""
    now = datetime.now(UTC)
    earlier = (now - timedelta(minutes=5)).isoformat()
    for newest in ("report", "price_api"):
        seen = set()
        for number, order in enumerate(permutations(range(4))):
            key = PositionKey(f"{newest[0].upper()}{number}USDT", Mode.ONE_WAY)
            apply(engine, [execution(key.asset, "Buy", "2", "100", executed_at=earlier)])
            for step in order:
                of_report = step % 2 == (newest == "report")
                age = timedelta(seconds=100 - step)
                if of_report:
                    apply(engine, [report(key.asset, str(100 + step), age, "2", now)])
                else:
                    mark = Mark(price=Decimal(100 + step), at=now - age, source="price_api")
                    with transaction(engine) as connection:
                        update_marks(connection, {key: mark}, rules=RULES, now=now)
            row = stored(engine)[key]
            names = ("size", "current_price", "current_price_at", "current_price_source", "unrealized_pnl")
            seen.add(tuple(row[name] for name in names))
        ((size, price, _, source, _),) = seen
        assert (size, price, source) == (2, 103, newest)


def test_a_row_of_an_older_service_is_taken_over_when_its_price_is_refreshed(
    engine: Engine, client: Bybit, clock: Clock
) -> None:
    with transaction(engine) as connection:
        connection.exec_driver_sql(
            "INSERT INTO positions (asset, mode, size, long_size, average_entry_price, long_avg_price,"
            " current_price, version, last_updated)"
            " VALUES ('BTCUSDT', 'one-way', 2, 2, 100, 100, 101, 5, now() - interval '1 hour')"
        )
    assert refresh(engine, client, clock) == {"due": 1, "priced": 1}
    row = stored(engine)[BTC]
    assert (row["size"], row["average_entry_price"], row["unrealized_pnl"], row["version"]) == (2, 100, 11, 6)
    with engine.connect() as connection:
        (entry,) = connection.execute(select(ledger)).mappings()
    assert (entry["kind"], entry["quantity"], entry["size_after"]) == ("adjustment", 2, 2)
