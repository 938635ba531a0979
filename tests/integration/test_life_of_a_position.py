"""A position lives through executions, reports, redeliveries and crashes, and is right after each of them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import Engine

from positions.domain import position
from positions.domain.events import Entry, Mode, Report
from positions.domain.figures import figures
from positions.domain.numbers import exact
from positions.domain.orders import fills_of
from positions.domain.position import empty, refolded, with_report
from positions.handlers.apply_events import apply_events
from positions.handlers.rebuild_position import rebuild_position
from positions.storage import positions as store
from positions.storage.database import transaction
from tests.integration.support import RULES, emptied, stored
from tests.unit.test_position_laws import KEYS, entries_of, reports_of


class Crash(Exception):
    """The process dies before its commit."""


def test_a_position_is_right_after_every_event(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position, "POINT_EVERY", 3)

    class Life(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.waiting: list[Entry | Report] = []
            self.delivered: list[Entry | Report] = []

        @initialize(data=st.data(), mode=st.sampled_from(Mode))
        def born(self, data: st.DataObject, mode: Mode) -> None:
            self.key = KEYS[mode]
            events: list[Entry | Report] = [
                *data.draw(entries_of(self.key)),
                *data.draw(reports_of(self.key)),
            ]
            self.waiting = list(data.draw(st.permutations(events)))
            emptied(engine)

        def deliver(self, events: Sequence[Entry | Report], *, crash: bool = False) -> None:
            def work(connection: Any) -> None:
                apply_events(connection, events, [], rules=RULES, now=datetime.now(UTC))
                if crash:
                    raise Crash

            try:
                with transaction(engine) as connection:
                    work(connection)
            except Crash:
                return
            self.delivered += [event for event in events if event not in self.delivered]

        @rule(number=st.integers(1, 4))
        def events_arrive(self, number: int) -> None:
            batch, self.waiting = self.waiting[:number], self.waiting[number:]
            self.deliver(batch)

        @rule(number=st.integers(1, 4))
        def the_worker_crashes_before_its_commit(self, number: int) -> None:
            self.deliver(self.waiting[:number], crash=True)

        @rule(data=st.data())
        def something_is_delivered_again(self, data: st.DataObject) -> None:
            if self.delivered:
                self.deliver([data.draw(st.sampled_from(self.delivered))])

        @invariant()
        def it_is_what_its_events_say(self) -> None:
            if not self.delivered:
                return
            with exact():
                expected = empty(self.key)
                for event in self.delivered:
                    if isinstance(event, Report):
                        expected = with_report(expected, event)
                entries = [event for event in self.delivered if isinstance(event, Entry)]
                expected, _ = refolded(expected, fills_of(entries), RULES.policy)
                wanted = figures(expected)
            row = stored(engine)[self.key]
            for name in ("size", "average_entry_price", "realized_pnl", "unrealized_pnl"):
                assert row[name] == getattr(wanted, name), name
            parts = row["realized_gross"] - row["fees_paid"] + row["funding_received"]
            assert parts + row["realized_adjustment"] == row["realized_pnl"]
            with transaction(engine) as connection:
                assert store.read(connection, [self.key])[self.key].version == row["version"]
                differences = rebuild_position(
                    connection, self.key, rules=RULES, now=datetime.now(UTC), repair=False
                )
            assert not differences

    run_state_machine_as_test(Life, settings=settings(max_examples=25, stateful_step_count=15, deadline=None))
