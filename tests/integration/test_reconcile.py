"""Validation against the exchange: each cause of a break made on purpose, found, and what was done then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, select, text

from positions.domain.events import Mode, PositionKey
from positions.handlers.validate_position import Validation
from positions.handlers.validate_positions import Validator
from positions.storage import validations
from positions.storage.database import Retry, transaction
from positions.storage.tables import breaks, ledger
from positions.venue.bybit import Bybit
from tests.integration import api
from tests.integration.api import Make
from tests.integration.processes import Process, environment, jobs
from tests.integration.support import (
    RULES,
    apply,
    assert_positions_are_the_fold_of_the_ledger,
    execution,
    stored,
)
from tests.venue import KEY, SECRET, Reply, Venue, refusal

BTC = PositionKey("BTCUSDT", Mode.ONE_WAY)
HEDGE = PositionKey("BTCUSDT", Mode.HEDGE)
START = datetime(2025, 1, 15, 10, tzinfo=UTC)
NOW = START + timedelta(hours=2)


@pytest.fixture
def venue() -> Iterator[Venue]:
    with Venue() as made:
        yield made


def validator(engine: Engine, venue: Venue | None, *, fix: bool = True, now: datetime = NOW) -> Validator:
    api = None
    if venue is not None:
        api = Bybit(
            venue.url,
            timeout_s=2,
            retries=1,
            key=SecretStr(KEY),
            secret=SecretStr(SECRET),
            sleep=lambda _: None,
        )
    return Validator(
        engine=engine, rules=RULES, retry=Retry(base_ms=1), venue=api, fix=fix, clock=lambda: now
    )


def run(
    engine: Engine, venue: Venue | None, *, fix: bool = True, now: datetime = NOW
) -> dict[PositionKey, Validation]:
    return dict(validator(engine, venue, fix=fix, now=now).run())


def ms(second: float) -> str:
    return str(int((START + timedelta(seconds=second)).timestamp() * 1000))


def record(
    size: str, second: int, *, average: str = "100", symbol: str = "BTCUSDT", **more: Any
) -> dict[str, Any]:
    """Return a position as the exchange records it; of a negative size sold."""
    side = "" if size == "0" else "Sell" if size.startswith("-") else "Buy"
    return {
        "symbol": symbol,
        "side": side,
        "size": size.removeprefix("-"),
        "avgPrice": average,
        "positionIdx": 0,
        "markPrice": "12345",
        "unrealisedPnl": "9",
        "cumRealisedPnl": "0",
        "createdTime": ms(0),
        "updatedTime": ms(second),
        "seq": 1000 + second,
        **more,
    }


def traded(message: dict[str, Any], *, link: str = "ours", **more: Any) -> dict[str, Any]:
    """Return an execution as the exchange records the one of ``message``."""
    return {
        "symbol": message["asset"],
        "execId": message["execution_id"],
        "orderId": message["order_id"],
        "orderLinkId": link,
        "createType": "CreateByUser",
        "side": message["side"],
        "execQty": message["execution_quantity"],
        "execPrice": message["execution_price"],
        "execFee": message["execution_fees"],
        "execType": "Trade",
        "execTime": str(int(datetime.fromisoformat(message["executed_at"]).timestamp() * 1000)),
        "closedSize": "0",
        "isMaker": False,
        **more,
    }


def funding(number: int, paid: str, second: int) -> dict[str, Any]:
    trade = execution("BTCUSDT", "Buy", "1", "100", number=second, execution_id=f"funding-{number}")
    return traded(trade, execType="Funding", execFee=paid, orderId="", orderLinkId="", createType="")


def kept(engine: Engine) -> list[dict[str, Any]]:
    with transaction(engine) as connection:
        return [dict(row) for row in connection.execute(select(breaks).order_by(breaks.c.id)).mappings()]


def told(engine: Engine) -> list[tuple[str, str, str | None]]:
    return [(row["kind"], row["cause"], row["resolution"]) for row in kept(engine)]


FIRST = execution("BTCUSDT", "Buy", "1", "100", number=1)
SECOND = execution("BTCUSDT", "Buy", "2", "100", number=2)


def agree(venue: Venue, *messages: dict[str, Any], size: str, second: int) -> None:
    """Let the exchange know of ``messages``, and say that they came to ``size``."""
    venue.executions = [traded(each) for each in messages]
    venue.positions = [record(size, second)]


def test_what_agrees_with_the_exchange_is_valid_and_asks_for_no_executions(
    engine: Engine, venue: Venue
) -> None:
    apply(engine, [FIRST, SECOND])
    agree(venue, FIRST, SECOND, size="3", second=2)
    before = stored(engine)
    assert run(engine, venue)[BTC].is_valid
    assert stored(engine) == before
    assert not kept(engine)
    assert not [path for path in venue.requests if "execution" in path]


def test_a_missing_fill_is_found_applied_once_and_a_duplicate_when_it_comes_by_the_queue(
    engine: Engine, venue: Venue
) -> None:
    apply(engine, [FIRST])
    agree(venue, FIRST, SECOND, size="3", second=2)
    found = run(engine, venue)[BTC]
    assert (found.is_valid, found.updated) == (False, True)
    assert found.error_message == "size of the net leg: ours 1, theirs 3"
    (row,) = kept(engine)
    assert (row["kind"], row["cause"], row["detail"]) == (
        "size",
        "missing_fill",
        "the venue alone has: exec:BTCUSDT-2",
    )
    assert (row["ours"], row["theirs"], row["resolution"]) == (1, 3, "executions_applied")
    assert (row["first_seen_at"], row["resolved_at"]) == (NOW, NOW)
    assert stored(engine)[BTC]["size"] == 3
    with engine.connect() as connection:
        body = connection.execute(text("SELECT body FROM outbox ORDER BY id DESC LIMIT 1")).scalar_one()
    assert '"update_source":"validation"' in body
    assert apply(engine, [SECOND]).counts["duplicate"] == 1
    assert stored(engine)[BTC]["size"] == 3
    assert_positions_are_the_fold_of_the_ledger(engine)
    assert run(engine, venue)[BTC].is_valid
    assert len(kept(engine)) == 1


def test_without_fix_nothing_is_written(engine: Engine, venue: Venue) -> None:
    apply(engine, [FIRST])
    agree(venue, FIRST, SECOND, size="3", second=2)
    before = stored(engine)
    found = run(engine, venue, fix=False)[BTC]
    (view,) = found.breaks
    assert (found.is_valid, found.updated, view.cause, view.resolution) == (
        False,
        False,
        "missing_fill",
        None,
    )
    assert stored(engine) == before
    assert not kept(engine)


def test_a_manual_trade_is_applied_as_the_execution_it_is(engine: Engine, venue: Venue) -> None:
    apply(engine, [FIRST])
    agree(venue, FIRST, size="3", second=2)
    venue.executions.append(traded(SECOND, link=""))
    run(engine, venue)
    assert told(engine) == [("size", "manual_trade", "executions_applied")]
    assert stored(engine)[BTC]["size"] == 3


def test_an_execution_held_twice_is_corrected_by_an_adjustment_of_the_venue_s_time(
    engine: Engine, venue: Venue
) -> None:
    apply(engine, [FIRST, SECOND, {**SECOND, "execution_id": "again"}])
    assert stored(engine)[BTC]["size"] == 5
    agree(venue, FIRST, SECOND, size="3", second=60)
    run(engine, venue)
    assert told(engine) == [("size", "duplicate", "taken_over")]
    assert stored(engine)[BTC]["size"] == 3
    with engine.connect() as connection:
        row = connection.execute(select(ledger).where(ledger.c.kind == "adjustment")).mappings().one()
    assert (row["quantity"], row["size_after"], row["executed_at"]) == (-2, 3, START + timedelta(seconds=60))
    # What it has twice stays in the ledger, which is append-only.
    assert run(engine, venue)[BTC].is_valid


def test_funding_that_was_missed_is_applied(engine: Engine, venue: Venue) -> None:
    apply(engine, [FIRST])
    agree(venue, FIRST, size="1", second=30)
    venue.positions[0]["cumRealisedPnl"] = "-0.25"
    venue.positions[0]["createdTime"] = ms(1)
    venue.executions.append(funding(1, "0.25", 30))
    run(engine, venue)
    assert told(engine) == [("realized", "funding", "executions_applied")]
    row = stored(engine)[BTC]
    assert (row["size"], row["realized_pnl"], row["funding_received"]) == (
        1,
        Decimal("-0.25"),
        Decimal("-0.25"),
    )


def test_rounding_stays_as_it_is_and_is_valid_until_it_is_gone(engine: Engine, venue: Venue) -> None:
    apply(engine, [FIRST])
    agree(venue, FIRST, size="1.00005", second=5)
    found = run(engine, venue)[BTC]
    assert (found.is_valid, [each.cause for each in found.breaks]) == (True, ["rounding"])
    later = NOW + timedelta(minutes=30)
    run(engine, venue, now=later)
    (row,) = kept(engine)
    assert (row["cause"], row["first_seen_at"], row["last_seen_at"], row["resolved_at"]) == (
        "rounding",
        NOW,
        later,
        None,
    )
    assert stored(engine)[BTC]["size"] == 1
    agree(venue, FIRST, size="1", second=6)
    run(engine, venue, now=later)
    assert told(engine) == [("size", "rounding", "agrees")]


def test_an_unknown_break_overrules_as_a_report_of_its_time_would(engine: Engine, venue: Venue) -> None:
    apply(engine, [FIRST])
    agree(venue, FIRST, size="7", second=60)
    run(engine, venue)
    assert told(engine) == [("size", "unknown", "taken_over")]
    assert stored(engine)[BTC]["size"] == 7
    # What comes late from before it is inside it.
    apply(engine, [SECOND])
    assert stored(engine)[BTC]["size"] == 7
    # Only size and average are the record's: its mark and profit are of another moment.
    assert stored(engine)[BTC]["current_price"] is None


def test_a_record_no_newer_than_the_last_fill_overrules_nothing(engine: Engine, venue: Venue) -> None:
    apply(engine, [FIRST])
    agree(venue, FIRST, size="7", second=1)
    for _ in range(2):
        run(engine, venue)
        assert told(engine) == [("size", "unknown", None)]
        assert stored(engine)[BTC]["size"] == 1


def test_a_break_that_goes_away_is_resolved_as_such(engine: Engine, venue: Venue) -> None:
    apply(engine, [FIRST])
    agree(venue, FIRST, size="7", second=1)
    run(engine, venue)
    agree(venue, FIRST, size="1", second=70)
    assert run(engine, venue)[BTC].is_valid
    assert told(engine) == [("size", "unknown", "agrees")]


@pytest.mark.parametrize("flat", [True, False])
def test_a_position_that_the_exchange_knows_nothing_of_is_never_wiped(
    engine: Engine, venue: Venue, *, flat: bool
) -> None:
    apply(engine, [FIRST])
    before = stored(engine)
    if flat:
        venue.positions = [record("0", 60)]
    for _ in range(2):
        found = run(engine, venue)[BTC]
        assert not found.is_valid
    assert told(engine) == [("size" if flat else "absent", "unknown", None)]
    assert stored(engine) == before
    # Executions say so: then it is closed.
    closing = execution("BTCUSDT", "Sell", "1", "120", number=50)
    venue.executions = [traded(FIRST), traded(closing)]
    run(engine, venue)
    assert stored(engine)[BTC]["size"] == 0
    assert [each["resolution"] for each in kept(engine)] == ["executions_applied"]


def test_a_flat_record_of_no_time_is_silence(engine: Engine, venue: Venue) -> None:
    apply(engine, [FIRST])
    venue.positions = [record("0", 0, updatedTime="0", createdTime="0")]
    run(engine, venue)
    assert told(engine) == [("absent", "unknown", None)]


def test_silence_ends_when_the_position_is_listed_or_closed(engine: Engine, venue: Venue) -> None:
    apply(engine, [FIRST])
    run(engine, venue)
    apply(engine, [execution("BTCUSDT", "Sell", "1", "120", number=50)])
    assert run(engine, venue)[BTC].is_valid
    assert told(engine) == [("absent", "unknown", "agrees")]


def test_a_position_that_only_the_exchange_has_is_made_of_its_executions(
    engine: Engine, venue: Venue
) -> None:
    agree(venue, FIRST, SECOND, size="3", second=2)
    found = run(engine, venue)
    assert not found[BTC].is_valid
    assert stored(engine)[BTC]["size"] == 3
    assert told(engine) == [("size", "missing_fill", "executions_applied")]
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_a_position_that_only_the_exchange_has_is_opened_by_its_record_where_executions_are_too_old(
    engine: Engine, venue: Venue
) -> None:
    agree(venue, SECOND, size="3", second=2)
    run(engine, venue)
    assert stored(engine)[BTC]["size"] == 3
    assert told(engine) == [("size", "unknown", "taken_over")]


def test_a_missing_fill_of_a_hedge_is_found_by_its_leg(engine: Engine, venue: Venue) -> None:
    opened = execution("BTCUSDT", "Buy", "2", "100", number=1, position_idx=1)
    missed = execution("BTCUSDT", "Buy", "3", "100", number=2)
    closed = execution("BTCUSDT", "Sell", "4", "100", number=3, position_idx=1)
    apply(engine, [opened, closed])
    assert [row["kind"] for row in kept(engine)] == ["over_reduction"]
    venue.positions = [
        record("1", 3, positionIdx=1),
        record("0", 3, positionIdx=2),
    ]
    venue.executions = [traded(opened), traded(missed), traded(closed, closedSize="4")]
    run(engine, venue)
    assert stored(engine)[HEDGE]["long_size"] == 1
    assert sorted(told(engine)) == [
        ("over_reduction", "missing_fill", "agrees"),
        ("size", "missing_fill", "executions_applied"),
    ]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=503),
        refusal(10004, "error sign!"),
        Reply(body=b"<html>"),
        Reply(body=b'{"retCode":0,"result":{"list":[{"symbol":"BTCUSDT","size":"x"}]}}'),
    ],
    ids=["away", "refuses", "no_json", "nonsense"],
)
def test_an_exchange_that_is_away_or_lies_changes_nothing(engine: Engine, venue: Venue, reply: Reply) -> None:
    apply(engine, [FIRST])
    with transaction(engine) as connection:
        connection.execute(text("UPDATE positions SET realized_pnl = 5"))
    venue.always = reply
    found = run(engine, venue)[BTC]
    # What needs no exchange is validated all the same.
    assert [each.kind for each in found.breaks] == ["stored_realized_pnl"]
    row = stored(engine)[BTC]
    assert (row["size"], row["realized_pnl"]) == (1, 0)


@pytest.mark.parametrize("path", ["/v5/position/list", "/v5/execution/list"])
def test_pages_that_break_off_are_never_taken_for_the_whole(engine: Engine, venue: Venue, path: str) -> None:
    ether = execution("ETHUSDT", "Buy", "1", "100", number=1)
    apply(engine, [FIRST, ether])
    venue.page = 1
    venue.positions = [record("3", 2), record("1", 1, symbol="ETHUSDT")]
    venue.executions = [traded(FIRST), traded(SECOND), traded(ether)]
    answer = venue._answer

    def broken(handler: Any) -> Reply:
        return (
            Reply(status=502)
            if handler.path.startswith(path) and "cursor" in handler.path
            else answer(handler)
        )

    venue._answer = broken  # type: ignore[method-assign]
    run(engine, venue)
    rows = stored(engine)
    assert {key.asset: row["size"] for key, row in rows.items()} == {"BTCUSDT": 1, "ETHUSDT": 1}
    assert {row["cause"] for row in kept(engine)} <= {"unknown"}
    venue._answer = answer  # type: ignore[method-assign]
    run(engine, venue)
    assert stored(engine)[BTC]["size"] == 3


def test_an_execution_that_cannot_be_read_keeps_the_others_from_being_taken_for_all(
    engine: Engine, venue: Venue
) -> None:
    apply(engine, [FIRST])
    agree(venue, FIRST, SECOND, size="3", second=2)
    venue.executions.append(traded(SECOND, execId="odd", execType="Astonishing"))
    run(engine, venue)
    assert told(engine) == [("size", "unknown", None)]
    assert stored(engine)[BTC]["size"] == 1


def test_what_is_on_its_way_is_left_to_the_queue(engine: Engine, venue: Venue) -> None:
    apply(engine, [FIRST])
    agree(venue, FIRST, SECOND, size="3", second=2)
    run(engine, venue, now=START + timedelta(seconds=20))
    assert not kept(engine)
    assert stored(engine)[BTC]["size"] == 1
    apply(engine, [SECOND])
    assert run(engine, venue)[BTC].is_valid


def test_a_run_that_is_cut_short_is_gone_on_with(engine: Engine) -> None:
    apply(engine, [execution(f"A{number}USDT", "Buy", "1", "100") for number in range(6)])
    seen = []
    for _ in range(3):
        seen += [key.asset for key, _ in validator(engine, None).run(limit=2)]
    assert seen == [f"A{number}USDT" for number in range(6)]
    first = next(validator(engine, None, now=NOW + timedelta(seconds=1)).run())
    assert first[0].asset == "A0USDT"
    assert next(validator(engine, None, now=NOW + timedelta(seconds=2)).run(seconds=-1), None) is None


def test_two_runs_at_once_do_no_harm(engine: Engine, venue: Venue) -> None:
    apply(engine, [FIRST])
    agree(venue, FIRST, SECOND, size="3", second=2)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: run(engine, venue), range(4)))
    assert stored(engine)[BTC]["size"] == 3
    assert told(engine) == [("size", "missing_fill", "executions_applied")]
    with validations.alone(engine) as first, validations.alone(engine) as second:
        assert (first, second) == (True, False)
    with validations.alone(engine) as third:
        assert third


def test_events_are_applied_while_a_run_reads_and_asks(engine: Engine, venue: Venue) -> None:
    """The run waits for the exchange; whoever writes does not wait for the run."""
    apply(engine, [FIRST])
    agree(venue, FIRST, SECOND, size="3", second=2)
    answer = venue._answer

    def meanwhile(handler: Any) -> Reply:
        number = 7200 + len(venue.requests)  # now, and after
        apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=number)], Retry(retries=0))
        return answer(handler)

    venue._answer = meanwhile  # type: ignore[method-assign]
    run(engine, venue)
    asked = len(venue.requests)
    assert asked >= 2
    assert stored(engine)[BTC]["size"] == 3 + asked
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_the_same_executions_by_queue_and_exchange_at_once_count_once(engine: Engine, venue: Venue) -> None:
    messages = [execution("BTCUSDT", "Buy", "1", "100", number=number) for number in range(1, 41)]
    apply(engine, messages[:1])
    agree(venue, *messages, size="40", second=40)
    writes: list[Callable[[], object]] = [
        partial(apply, engine, [each], Retry(base_ms=1)) for each in messages[1:]
    ]
    reads: list[Callable[[], object]] = [partial(run, engine, venue)] * 4
    with ThreadPoolExecutor(6) as pool:
        for each in [pool.submit(work) for work in (*reads, *writes)]:
            each.result()
    assert stored(engine)[BTC]["size"] == 40
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_who_asks_for_one_position_has_the_exchange_asked_too(
    engine: Engine, venue: Venue, make_app: Make, database_url: str
) -> None:
    lately = datetime.now(UTC) - timedelta(hours=1)
    first, second = ({**each, "executed_at": lately.isoformat()} for each in (FIRST, SECOND))
    apply(engine, [first])
    agree(venue, first, second, size="3", second=0)
    venue.positions[0]["updatedTime"] = venue.executions[0]["execTime"]
    settings = {"PRICE_API_URL": venue.url, "BYBIT_API_KEY": KEY, "BYBIT_API_SECRET": SECRET}
    app = make_app(database_url, **{f"POSITION_MANAGER_{name}": value for name, value in settings.items()})
    post = partial(
        app.test_client().post, "/api/v1/positions/BTCUSDT/validate", headers={"X-API-Key": api.KEY}
    )
    found = post(query_string={"fix_discrepancies": "false"}).get_json()
    assert (found["is_valid"], found["updated_position"]) == (False, None)
    assert [each["cause"] for each in found["breaks"]] == ["missing_fill"]
    assert stored(engine)[BTC]["size"] == 1
    found = post().get_json()
    assert found["updated_position"]["size"] == "3"
    assert [each["resolution"] for each in found["breaks"]] == ["executions_applied"]
    venue.stop()
    assert post().get_json() == {
        "is_valid": True,
        "error_message": None,
        "updated_position": None,
        "breaks": [],
    }


def test_outcomes_are_counted(engine: Engine, venue: Venue) -> None:
    apply(engine, [FIRST, execution("ETHUSDT", "Buy", "1", "100")])
    agree(venue, FIRST, SECOND, size="3", second=2)
    run(engine, venue)
    with transaction(engine) as connection:
        assert validations.outcomes(connection) == {"valid": 0, "repaired": 1, "invalid": 1}
        assert validations.open_breaks(connection) == {"unknown": 1}


def test_the_job_validates_all_positions_on_schedule(
    engine: Engine, venue: Venue, database_url: str, broker_url: str, redis_url: str, tmp_path: Path
) -> None:
    lately = datetime.now(UTC) - timedelta(hours=1)
    first, second = ({**each, "executed_at": lately.isoformat()} for each in (FIRST, SECOND))
    apply(engine, [first])
    agree(venue, first, second, size="3", second=0)
    venue.positions[0]["updatedTime"] = venue.executions[0]["execTime"]
    env = environment(
        database_url,
        broker_url,
        redis_url,
        validation_interval="1",
        price_api_url=venue.url,
        bybit_api_key=KEY,
        bybit_api_secret=SECRET,
    )
    with jobs(env, tmp_path) as worker:
        beat = Process(
            ["celery", "-A", "celery_app", "beat", "--pidfile=", "-s", str(tmp_path / "beat")],
            env,
            tmp_path / "beat.log",
        )
        try:
            worker.await_log("positions_validated", times=2)
        finally:
            beat.kill()
        log = worker.log.read_text()
    assert told(engine) == [("size", "missing_fill", "executions_applied")]
    assert stored(engine)[BTC]["size"] == 3
    assert "break_found" in log
    assert SECRET not in log
    with transaction(engine) as connection:
        assert validations.outcomes(connection)["repaired"] == 1
