"""`portfolio_updated`: when something changed, and never more often than the interval."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine, select

from positions.handlers.publish_portfolio import publish_portfolio
from positions.messages.outbound import PortfolioSums
from positions.storage.database import transaction
from positions.storage.portfolio import Sums
from positions.storage.tables import outbox
from tests.integration.support import apply, execution

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def published(engine: Engine, second: float) -> bool:
    with transaction(engine) as connection:
        return publish_portfolio(
            connection,
            Sums(PortfolioSums()),
            now=NOW + timedelta(seconds=second),
            interval=timedelta(seconds=1),
            stale_after=timedelta(minutes=5),
            max_exposure=None,
        )


def test_an_empty_portfolio_says_nothing(engine: Engine) -> None:
    assert not published(engine, 0)


def test_it_is_published_once_for_each_change_and_interval(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", execution_fees="2", number=1)])
    assert published(engine, 0)
    assert not published(engine, 1)
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=2)])
    assert not published(engine, 0.1)
    assert published(engine, 2)
    with engine.connect() as connection:
        bodies = connection.execute(
            select(outbox.c.body).where(outbox.c.event_type == "portfolio_updated").order_by(outbox.c.id)
        ).scalars()
        first, second = map(json.loads, bodies)
    assert first["event_type"] == "portfolio_updated"
    assert first["total_realized_pnl_usdt"] == "-2"
    assert second["by_asset"]["BTCUSDT"]["size"] == "2"
    assert second["unpriced_assets"] == ["BTCUSDT"]
    assert second["trace_id"]
    assert second["timestamp"] == "2026-01-01T00:00:02Z"


def test_two_beats_between_each_other_publish_no_more_than_one(engine: Engine) -> None:
    told = []
    for tick in range(8):
        apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=tick)])
        told.append(published(engine, 1.02 * (tick // 2) + 0.5 * (tick % 2)))
    assert told == [True, False] * 4
    # A single beat's tick that is a little early is as good.
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=8)])
    assert published(engine, 1.02 * 3 + 0.95)


def test_a_clock_that_is_set_back_does_not_silence_it(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=1)])
    assert published(engine, 7200)
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=2)])
    assert published(engine, 0)
    # Of hosts whose clocks differ a little none sets the other's back.
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=3)])
    assert not published(engine, -5)
