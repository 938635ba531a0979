"""Which prices are believed at once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from positions.domain.numbers import exact
from positions.domain.position import Mark
from positions.domain.prices import FORGOTTEN_AFTER, JUMP, near, plausible

AT = datetime(2026, 1, 1, tzinfo=UTC)
prices = st.decimals("1e-18", "1e19", places=18)


@given(prices, prices, prices)
def test_a_jump_is_the_same_up_and_down_and_at_any_scale(
    one: Decimal, other: Decimal, scale: Decimal
) -> None:
    with exact():
        assert near(one, other) == near(other, one) == near(one * scale, other * scale)
        assert near(one, one)
        assert not near(one, one * JUMP)
        assert not near(one, -other)


@pytest.mark.parametrize(
    ("price", "age", "believed"),
    [
        ("124.99", timedelta(minutes=5), True),
        ("125", timedelta(minutes=5), False),
        ("80.01", timedelta(minutes=5), True),
        ("80", timedelta(minutes=5), False),
        ("9000", FORGOTTEN_AFTER, False),
        ("9000", FORGOTTEN_AFTER + timedelta(seconds=1), True),
    ],
)
def test_a_jump_is_doubted_while_the_last_price_is_remembered(
    price: str, age: timedelta, *, believed: bool
) -> None:
    known = Mark(price=Decimal(100), at=AT - age, source="report")
    assert plausible(Decimal(price), AT, known) is believed
    assert plausible(Decimal(price), AT, None)
