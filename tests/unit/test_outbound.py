"""The figures and the exact text of what is said of a position and of the portfolio."""

from __future__ import annotations

import json
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from positions.domain.events import Mode, PositionKey
from positions.domain.figures import Figures
from positions.domain.times import utc_text
from positions.messages.outbound import (
    PortfolioSums,
    PortfolioView,
    PositionView,
    object_of,
    to_json,
)
from positions.messages.published import position_updated

NOW = datetime(2025, 1, 15, 10, 0, tzinfo=UTC)
STALE_AFTER = timedelta(seconds=300)
AMOUNTS = st.decimals(allow_nan=False, allow_infinity=False, places=18, min_value=-(10**19), max_value=10**19)
TIMES = st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=2))])).filter(
    lambda at: at.year in range(2009, 9999)
)


def _row(**changes: Any) -> dict[str, Any]:
    row = {
        "id": "0b0e7e4c-3c43-4b55-9c5a-0c4a3f1f6a01",
        "asset": "BTCUSDT",
        "mode": "one-way",
        "size": Decimal("1.500000000000000000"),
        "average_entry_price": Decimal("50000.000000000000000000"),
        "current_price": Decimal("50100.000000000000000000"),
        "current_price_at": NOW,
        "current_price_source": "report",
        "unrealized_pnl": Decimal("150.000000000000000000"),
        "realized_pnl": Decimal("0E-18"),
        "long_size": Decimal("1.500000000000000000"),
        "short_size": Decimal("0E-18"),
        "long_avg_price": Decimal("50000.000000000000000000"),
        "short_avg_price": None,
        "version": 3,
        "last_updated": NOW,
        "last_snapshot_at": None,
        "opened_at": NOW - timedelta(minutes=61, seconds=59),
        "closed_at": None,
        "created_at": datetime(2025, 1, 1, tzinfo=timezone(timedelta(hours=2))),
        "state": {"of": "nobody's concern"},
    }
    assert changes.keys() <= row.keys()
    return row | changes


def _view(portfolio_exposure: str = "300600", **changes: Any) -> PositionView:
    return PositionView.of(
        _row(**changes), portfolio_exposure=Decimal(portfolio_exposure), now=NOW, stale_after=STALE_AFTER
    )


FLAT: dict[str, Any] = {
    "size": Decimal(0),
    "long_size": Decimal(0),
    "average_entry_price": None,
    "long_avg_price": None,
    "unrealized_pnl": Decimal(0),
    "opened_at": None,
    "closed_at": NOW,
}
BOTH_LEGS: dict[str, Any] = {
    "mode": "hedge",
    "size": Decimal(1),
    "long_size": Decimal(3),
    "short_size": Decimal(-2),
    "average_entry_price": None,
    "current_price": Decimal(10),
    "unrealized_pnl": Decimal(5),
}


def test_position_object_is_the_contracts() -> None:
    assert list(object_of(_view()).items()) == [
        ("id", "0b0e7e4c-3c43-4b55-9c5a-0c4a3f1f6a01"),
        ("asset", "BTCUSDT"),
        ("mode", "one-way"),
        ("size", "1.5"),
        ("average_entry_price", "50000"),
        ("current_price", "50100"),
        ("current_price_at", "2025-01-15T10:00:00Z"),
        ("current_price_source", "report"),
        ("price_is_stale", False),
        ("unrealized_pnl", "150"),
        ("realized_pnl", "0"),
        ("long_size", "1.5"),
        ("short_size", "0"),
        ("long_avg_price", "50000"),
        ("short_avg_price", None),
        ("unrealized_pnl_pct", "0.2"),
        ("time_held_minutes", 61),
        ("position_size_norm", "0.25"),
        ("version", 3),
        ("last_updated", "2025-01-15T10:00:00Z"),
        ("last_snapshot_at", None),
        ("opened_at", "2025-01-15T08:58:01Z"),
        ("closed_at", None),
        ("created_at", "2024-12-31T22:00:00Z"),
    ]


def test_view_of_figures_is_the_view_of_their_row() -> None:
    row = _row()
    parts = ("realized_gross", "fees_paid", "funding_received", "realized_adjustment")
    stored = {**row, **dict.fromkeys(parts, Decimal(0))}
    figures = Figures(**{field.name: stored[field.name] for field in fields(Figures)})
    view = PositionView.of_figures(
        figures,
        id=row["id"],
        key=PositionKey("BTCUSDT", Mode.ONE_WAY),
        version=3,
        last_updated=NOW,
        last_snapshot_at=None,
        created_at=row["created_at"],
        portfolio_exposure=Decimal(300600),
        now=NOW,
        stale_after=STALE_AFTER,
    )
    assert view == _view()
    assert type(view.mode) is str


def test_flat_position_has_zeros_at_any_price_and_none() -> None:
    for price in (Decimal(50100), None):
        view = _view(current_price=price, **FLAT)
        assert view.unrealized_pnl_pct == view.position_size_norm == view.time_held_minutes == 0


def test_unpriced_position_has_no_share() -> None:
    view = _view(current_price=None, current_price_at=None)
    assert view.position_size_norm is None
    assert view.unrealized_pnl_pct == Decimal("0.2")
    assert not view.price_is_stale


def test_without_an_average_percent_are_of_the_exposure() -> None:
    assert _view(average_entry_price=None).unrealized_pnl_pct == Decimal("0.199600798403193613")
    assert _view(average_entry_price=None, current_price=None).unrealized_pnl_pct is None


def test_hedged_position_counts_both_legs_for_percent_and_the_net_size_for_its_share() -> None:
    view = _view("50", **BOTH_LEGS)
    assert view.unrealized_pnl_pct == 10
    assert view.position_size_norm == Decimal("0.2")


def test_hedge_of_equal_legs_is_open() -> None:
    level = {**BOTH_LEGS, "size": Decimal(0), "short_size": Decimal(-3)}
    view = _view("60", **level)
    assert view.unrealized_pnl_pct == Decimal("8.333333333333333333")
    assert view.position_size_norm == 0
    unpriced = _view("60", **{**level, "current_price": None})
    assert (unpriced.unrealized_pnl_pct, unpriced.position_size_norm) == (None, None)


@pytest.mark.parametrize(
    ("price_at", "stale"),
    [
        (NOW - STALE_AFTER, False),
        (NOW - STALE_AFTER - timedelta(microseconds=1), True),
        (NOW + timedelta(hours=1), False),
        (None, True),
    ],
)
def test_price_is_stale_by_its_own_time(price_at: datetime | None, stale: bool) -> None:
    assert _view(current_price_at=price_at, last_updated=NOW).price_is_stale is stale


def test_products_keep_every_digit() -> None:
    view = _view(
        average_entry_price=Decimal(1), size=Decimal(1), unrealized_pnl=Decimal("1" * 20 + "." + "2" * 18)
    )
    assert str(view.unrealized_pnl_pct) == "1" * 20 + "22." + "2" * 16 + "00"


def _sums(asset: str, **changes: Any) -> dict[str, Any]:
    zero = Decimal("0E-18")
    row = {
        "asset": asset,
        "exposure": zero,
        "net_exposure": zero,
        "size": zero,
        "unrealized_pnl": zero,
        "realized_pnl": zero,
        "realized_gross": zero,
        "fees_paid": zero,
        "funding_received": zero,
        "realized_adjustment": zero,
        "open_count": 0,
        "long_count": 0,
        "short_count": 0,
        "unpriced": False,
        "oldest_price_at": NOW,
        "ids": 0,
    }
    assert changes.keys() <= row.keys()
    return row | changes


SUMS = [
    _sums(
        "BTCUSDT",
        exposure=Decimal("75150.0"),
        net_exposure=Decimal("75150.0"),
        size=Decimal("1.5"),
        unrealized_pnl=Decimal(150),
        realized_pnl=Decimal("47.9"),
        realized_gross=Decimal(50),
        fees_paid=Decimal(3),
        funding_received=Decimal("-0.1"),
        realized_adjustment=Decimal(1),
        open_count=1,
        long_count=1,
    ),
    _sums("DOGEUSDT", exposure=Decimal("24.8"), net_exposure=Decimal("-24.8"), size=Decimal(-200),
          open_count=1, short_count=1, oldest_price_at=NOW - STALE_AFTER - timedelta(microseconds=1)),
    _sums("ETHUSDT", exposure=None, net_exposure=None, size=Decimal(1), open_count=1, long_count=1,
          unpriced=True, oldest_price_at=None),
]  # fmt: skip


def _portfolio(limit: str | None = None, asset: str | None = None) -> PortfolioView:
    return PortfolioView.of(
        PortfolioSums().with_rows(SUMS),
        max_exposure=Decimal(limit) if limit else None,
        now=NOW,
        stale_after=STALE_AFTER,
        asset=asset,
    )


def test_portfolio_object_is_the_contracts() -> None:
    answer = json.loads(to_json(object_of(_portfolio())))
    by_asset = answer.pop("by_asset")
    assert answer == {
        "total_exposure_usdt": "75174.8",
        "net_exposure_usdt": "75125.2",
        "portfolio_value_usdt": "75125.2",
        "total_unrealized_pnl_usdt": "150",
        "total_realized_pnl_usdt": "47.9",
        "total_pnl_usdt": "197.9",
        "total_realized_gross_usdt": "50",
        "total_fees_usdt": "3",
        "total_funding_usdt": "-0.1",
        "total_realized_adjustment_usdt": "1",
        "open_positions_count": 3,
        "long_positions_count": 2,
        "short_positions_count": 1,
        "limit_exceeded": False,
        "unpriced_assets": ["ETHUSDT"],
        "stale_assets": ["DOGEUSDT"],
        "calculated_at": "2025-01-15T10:00:00Z",
    }
    assert list(by_asset) == ["BTCUSDT", "DOGEUSDT", "ETHUSDT"]
    assert by_asset["BTCUSDT"] == {
        "exposure": "75150",
        "unrealized": "150",
        "realized": "47.9",
        "exposure_usdt": "75150",
        "unrealized_pnl_usdt": "150",
        "realized_pnl_usdt": "47.9",
        "size": "1.5",
    }
    assert by_asset["ETHUSDT"]["exposure"] is None


_AMOUNTS = st.decimals(-(10**20), 10**20, allow_nan=False, allow_infinity=False, places=18)


@given(
    st.lists(
        st.tuples(st.sampled_from("ABCD"), _AMOUNTS, _AMOUNTS, st.none() | _AMOUNTS, st.integers(0, 2)),
        max_size=12,
    ),
    st.data(),
)
def test_sums_that_are_gone_on_from_are_those_of_the_last_rows(told: list[Any], data: st.DataObject) -> None:
    rows = [
        _sums(asset, unrealized_pnl=one, fees_paid=other, exposure=third, open_count=count, ids=count - 1)
        for asset, one, other, third, count in told
    ]
    step_by_step = PortfolioSums()
    while rows:
        until = data.draw(st.integers(1, len(rows)))
        step_by_step, rows = step_by_step.with_rows(rows[:until]), rows[until:]
    last = {asset: row for asset, *row in told}
    at_once = PortfolioSums().with_rows(
        _sums(asset, unrealized_pnl=one, fees_paid=other, exposure=third, open_count=count, ids=count - 1)
        for asset, (one, other, third, count) in last.items()
    )
    assert step_by_step == at_once
    assert list(step_by_step.by_asset) == sorted(last)


def test_nothing_held_is_zeros() -> None:
    view = PortfolioView.of(PortfolioSums(), max_exposure=Decimal(0), now=NOW, stale_after=STALE_AFTER)
    answer = json.loads(to_json(object_of(view)))
    assert answer["total_exposure_usdt"] == answer["total_pnl_usdt"] == "0"
    assert answer["open_positions_count"] == 0
    assert answer["by_asset"] == {}
    assert answer["limit_exceeded"] is False


@pytest.mark.parametrize(
    ("limit", "exceeded"), [(None, False), ("75174.8", False), ("75174.799999999999999999", True)]
)
def test_limit_is_exceeded_above_it(limit: str | None, exceeded: bool) -> None:
    assert _portfolio(limit).limit_exceeded is exceeded


def test_one_assets_figures_and_the_whole_portfolios_limit() -> None:
    view = _portfolio("100", "DOGEUSDT")
    assert view.total_exposure_usdt == Decimal("24.8")
    assert list(view.by_asset) == ["DOGEUSDT"]
    assert view.open_positions_count == 1
    assert view.limit_exceeded


def test_time_is_utc_ending_in_z() -> None:
    assert utc_text(datetime(2025, 1, 15, 12, 0, 0, 5, tzinfo=timezone(timedelta(hours=2)))) == (
        "2025-01-15T10:00:00.000005Z"
    )


@given(
    st.builds(
        Figures,
        **dict.fromkeys(("size", "unrealized_pnl", "realized_pnl", "long_size", "short_size"), AMOUNTS),
        **dict.fromkeys(("realized_gross", "fees_paid", "funding_received", "realized_adjustment"), AMOUNTS),
        **dict.fromkeys(("average_entry_price", "long_avg_price", "short_avg_price"), st.none() | AMOUNTS),
        current_price=st.none() | AMOUNTS,
        current_price_source=st.none() | st.text(),
        **dict.fromkeys(("current_price_at", "opened_at", "closed_at"), st.none() | TIMES),
    ),
    TIMES,
    st.text(),
    st.text(),
)
def test_a_position_is_told_as_it_would_be_encoded(
    figures: Figures, at: datetime, trace_id: str, source: str
) -> None:
    view = PositionView.of_figures(
        figures,
        id="0b0e7e4c-3c43-4b55-9c5a-0c4a3f1f6a01",
        key=PositionKey("BTCUSDT", Mode.HEDGE),
        version=7,
        last_updated=at,
        last_snapshot_at=None,
        created_at=at,
        portfolio_exposure=Decimal("123.4"),
        now=at,
        stale_after=STALE_AFTER,
    )
    told = position_updated(view, update_source=source, events_covered=3, trace_id=trace_id, now=at)
    position = object_of(view)
    assert told == to_json(
        {
            "event_type": "position_updated",
            "trace_id": trace_id,
            "timestamp": utc_text(at),
            **position,
            "position_id": view.id,
            "avg_price": position["average_entry_price"],
            "update_source": source,
            "events_covered": 3,
            "position": position,
        }
    )
