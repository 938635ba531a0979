"""Late fills through the database: folded on from points, and never at the neighbours' cost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, func, select

from positions.domain import position
from positions.domain.events import Entry, Mode, PositionKey, Report
from positions.domain.figures import figures
from positions.domain.numbers import exact
from positions.domain.orders import fills_of
from positions.domain.position import empty, refolded, with_report
from positions.errors import DeepRefold, Unavailable
from positions.handlers import refold
from positions.handlers.apply_events import apply_events
from positions.storage import positions as store
from positions.storage.database import Retry, in_transaction, transaction
from positions.storage.tables import fold_points
from tests.integration.support import (
    RULES,
    apply,
    assert_positions_are_the_fold_of_the_ledger,
    emptied,
    execution,
    stored,
)
from tests.unit.test_position_laws import History, comparable, histories

BTC = PositionKey("BTCUSDT", Mode.ONE_WAY)


def fills(number: int, *, seed: int = 3) -> list[dict[str, Any]]:
    random = Random(seed)
    return [
        execution(
            "BTCUSDT",
            random.choice(["Buy", "Sell"]),
            str(random.randint(1, 900) / 1000),
            str(random.randint(100, 900) / 10),
            number=each,
        )
        for each in range(number)
    ]


def test_late_fills_are_folded_from_points_to_the_same_digits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(position, "POINT_EVERY", 20)
    messages = fills(400)
    random = Random(5)
    late = random.sample(range(400), 40)
    for start in range(0, 400, 10):
        apply(engine, [messages[each] for each in range(start, start + 10) if each not in late])
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(fold_points)).scalar_one() >= 10
    for each in late:
        apply(engine, [messages[each]])
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_a_point_goes_with_the_fills_that_were_taken_back(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An execution that takes the place of many implied fills takes the points among them along."""
    monkeypatch.setattr(position, "POINT_EVERY", 5)
    for filled in range(1, 21):
        order = {"order_id": "A", "asset": "BTCUSDT", "side": "Buy", "filled_quantity": filled}
        at = f"2025-01-15T10:00:{filled:02}Z"
        figures_ = {"average_price": 100, "fees": 0, "executed_at": at}
        apply(engine, [{"event_type": "partially_filled", "event_id": at, "order": {**order, **figures_}}])
    whole = execution("BTCUSDT", "Buy", "20", "100", number=100, order_id="A")
    apply(engine, [whole])
    assert stored(engine)[BTC]["size"] == 20
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=50)])
    assert stored(engine)[BTC]["size"] == 21
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_a_deep_refold_waits_for_its_own_transaction(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = fills(60)
    apply(engine, messages[1:])
    monkeypatch.setattr(refold, "BESIDE_OTHERS_MAX", 20)
    with pytest.raises(DeepRefold) as raised:
        apply(engine, [messages[0], execution("ETHUSDT", "Buy", "1", "100")])
    assert raised.value.positions == [BTC]
    assert apply(engine, [messages[0]]).counts["refolded"] == 1
    assert_positions_are_the_fold_of_the_ledger(engine)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(histories(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_any_arrival_order_by_concurrent_writers_ends_the_same(
    engine: Engine, history: History, every: int, random: Random
) -> None:
    """The law of convergence through the real database; a writer that crashes tries again."""
    key, events, batches = history
    emptied(engine)
    crashes = {number for number in range(len(batches)) if random.random() < 0.3}

    def write(numbered: tuple[int, list[Entry | Report]]) -> None:
        number, batch = numbered

        def work(connection: Any) -> None:
            apply_events(connection, batch, [], rules=RULES, now=datetime.now(UTC))
            if number in crashes:
                crashes.discard(number)
                raise Unavailable("crashed before the commit")

        in_transaction(engine, work, retry=Retry(retries=5, base_ms=1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(position, "POINT_EVERY", every)
        with ThreadPoolExecutor(max_workers=3) as pool:
            list(pool.map(write, enumerate(batches)))
        with exact():
            expected = empty(key)
            for event in events:
                if isinstance(event, Report):
                    expected = with_report(expected, event)
            entries = [event for event in events if isinstance(event, Entry)]
            expected, _ = refolded(expected, fills_of(entries), RULES.policy)
            if not events:
                return
            with transaction(engine) as connection:
                found = store.read(connection, [key])[key].state
            assert comparable(found) == comparable(expected)
            row = stored(engine)[key]
            for name in ("size", "average_entry_price", "realized_pnl", "unrealized_pnl"):
                assert row[name] == getattr(figures(expected), name)
