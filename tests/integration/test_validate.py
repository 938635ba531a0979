"""Validation: what differs from the ledger is told and set right; what differs from the venue stays."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine, text

from positions.domain.events import Mode, PositionKey
from positions.errors import NotFound
from positions.handlers.validate_position import Validation, validate_position
from positions.messages.outbound import object_of
from positions.storage import breaks
from positions.storage.database import Retry, in_transaction, transaction
from tests.integration.support import RULES, apply, execution, stored

BTC = PositionKey("BTCUSDT", Mode.ONE_WAY)
HEDGE = PositionKey("BTCUSDT", Mode.HEDGE)
NOW = datetime(2025, 1, 15, 12, tzinfo=UTC)


def validate(engine: Engine, key: PositionKey = BTC, *, fix: bool = False) -> Validation:
    with transaction(engine) as connection:
        return validate_position(connection, key, rules=RULES, now=NOW, fix=fix)


def kept(engine: Engine, key: PositionKey = BTC) -> list[Any]:
    with transaction(engine) as connection:
        return list(breaks.listed(connection, stored(engine)[key]["id"], open_only=False))


def corrupt(engine: Engine, change: str) -> None:
    with transaction(engine) as connection:
        connection.execute(text(f"UPDATE positions SET {change}"))


def trade(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "2", "100", execution_fees="0.5")])
    apply(engine, [execution("BTCUSDT", "Sell", "0.5", "120", number=9)])


def reported(engine: Engine, size: str, at: str) -> None:
    data = {"symbol": "BTCUSDT", "side": "Buy", "size": size, "avgPrice": "105", "timestamp": at}
    apply(engine, [{"event_type": "position", "data": data}])


def test_a_position_that_is_the_fold_of_its_ledger_is_valid_and_stays_as_it_is(engine: Engine) -> None:
    trade(engine)
    before = stored(engine)
    for fix in (False, True):
        assert validate(engine, fix=fix) == Validation(
            is_valid=True, error_message=None, breaks=(), updated=False
        )
    assert stored(engine) == before
    assert not kept(engine)


def test_a_wrong_figure_is_told_and_without_fix_nothing_is_written(engine: Engine) -> None:
    trade(engine)
    corrupt(engine, "size = 7, average_entry_price = NULL")
    before = stored(engine)
    found = validate(engine)
    assert (found.is_valid, found.updated) == (False, False)
    assert found.error_message == (
        "size: stored 7, the ledger folds to 1.5; average_entry_price: stored none, the ledger folds to 100"
    )
    assert [(each.kind, each.ours, each.theirs, each.resolution) for each in found.breaks] == [
        ("stored_size", Decimal("1.5"), 7, None),
        ("stored_average_entry_price", 100, 0, None),
    ]
    assert stored(engine) == before
    assert not kept(engine)


def test_a_wrong_figure_is_set_right_told_to_the_neighbours_and_kept_as_a_break(engine: Engine) -> None:
    trade(engine)
    right = stored(engine)[BTC]
    corrupt(engine, "size = 7, realized_pnl = 0")
    found = validate(engine, fix=True)
    assert (found.is_valid, found.updated) == (False, True)
    row = stored(engine)[BTC]
    assert (row["size"], row["realized_pnl"], row["version"]) == (
        right["size"],
        right["realized_pnl"],
        right["version"] + 1,
    )
    rows = kept(engine)
    assert [(each["kind"], each["ours"], each["theirs"], each["resolution"]) for each in rows] == [
        ("stored_size", Decimal("1.5"), 7, "refolded"),
        ("stored_realized_pnl", Decimal("9.5"), 0, "refolded"),
    ]
    with engine.connect() as connection:
        body = connection.execute(text("SELECT body FROM outbox ORDER BY id DESC LIMIT 1")).scalar_one()
    assert '"update_source":"validation"' in body
    assert validate(engine, fix=True).is_valid


def test_what_is_wrong_a_second_time_is_a_break_of_its_own(engine: Engine) -> None:
    trade(engine)
    for size in (7, 8):
        corrupt(engine, f"size = {size}")
        validate(engine, fix=True)
    assert [each["theirs"] for each in kept(engine)] == [7, 8]


def test_a_wrong_time_is_set_right_too(engine: Engine) -> None:
    trade(engine)
    opened_at = stored(engine)[BTC]["opened_at"]
    corrupt(engine, "opened_at = '2020-01-01T00:00:00Z'")
    found = validate(engine, fix=True)
    assert found.error_message == (
        "opened_at: stored 2020-01-01T00:00:00Z, the ledger folds to 2025-01-15T10:00:00Z"
    )
    assert stored(engine)[BTC]["opened_at"] == opened_at
    assert [each["kind"] for each in kept(engine)] == ["stored_opened_at"]


def test_a_break_with_the_venue_stands_and_is_not_written_over(engine: Engine) -> None:
    trade(engine)
    reported(engine, "5", "2025-01-15T10:00:09Z")
    size = stored(engine)[BTC]["size"]
    (open_break,) = kept(engine)
    found = validate(engine, fix=True)
    assert (found.is_valid, found.updated) == (False, False)
    assert found.error_message == "size of the net leg: ours 1.5, theirs 5"
    (view,) = found.breaks
    assert object_of(view)["theirs"] == "5"
    assert view.first_seen_at == open_break["first_seen_at"]
    assert stored(engine)[BTC]["size"] == size
    (row,) = kept(engine)
    assert (row["first_seen_at"], row["last_seen_at"]) == (open_break["first_seen_at"], NOW)


def test_a_break_that_was_lost_is_found_again(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Sell", "2", "100", position_idx=1)])
    with transaction(engine) as connection:
        connection.execute(text("DELETE FROM breaks"))
    assert [(each.kind, each.leg, each.ours) for each in validate(engine, HEDGE).breaks] == [
        ("over_reduction", "long", 2)
    ]
    assert not kept(engine, HEDGE)
    validate(engine, HEDGE, fix=True)
    (row,) = kept(engine, HEDGE)
    assert (row["kind"], row["resolved_at"]) == ("over_reduction", None)


def test_a_size_taken_over_from_the_venue_is_valid_and_stays(engine: Engine) -> None:
    trade(engine)
    reported(engine, "5", "2025-01-15T11:00:00Z")
    assert validate(engine, fix=True).is_valid
    assert stored(engine)[BTC]["size"] == 5


def test_a_position_of_reports_alone_is_never_wiped_for_want_of_fills(engine: Engine) -> None:
    reported(engine, "5", "2025-01-15T11:00:00Z")
    assert validate(engine, fix=True).is_valid
    assert stored(engine)[BTC]["size"] == 5


def test_a_position_that_an_older_service_left_is_valid_as_it_is(engine: Engine) -> None:
    with transaction(engine) as connection:
        connection.execute(
            text(
                "INSERT INTO positions (asset, mode, size, long_size, average_entry_price, current_price,"
                " realized_pnl, realized_adjustment, version) VALUES"
                " ('BTCUSDT', 'one-way', 3, 3, 100, 90, 5, 5, 4)"
            )
        )
    before = stored(engine)
    assert validate(engine, fix=True).is_valid
    assert stored(engine) == before


def test_an_unknown_position_cannot_be_validated(engine: Engine) -> None:
    with pytest.raises(NotFound, match="BTCUSDT"):
        validate(engine, fix=True)


def test_a_position_is_right_however_many_fix_it_while_it_changes(engine: Engine) -> None:
    trade(engine)
    corrupt(engine, "size = 7")

    def work(number: int) -> None:
        if number % 2:
            apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=10 + number)], Retry(base_ms=1))
        else:
            in_transaction(
                engine,
                lambda connection: validate_position(connection, BTC, rules=RULES, now=NOW, fix=True),
                retry=Retry(base_ms=1),
            )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(20)))
    assert stored(engine)[BTC]["size"] == Decimal("11.5")
    assert validate(engine).is_valid
    assert len([each for each in kept(engine) if each["kind"] == "stored_size"]) <= 1
