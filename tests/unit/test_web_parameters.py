"""What the API takes as a parameter, and how it says what it does not take."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from werkzeug.datastructures import MultiDict

from positions.domain.events import Mode, PositionKey
from positions.queries.positions import Status
from positions.web.parameters import OfAsset, Parameters, cursor_of, parsed
from positions.web.portfolio import Wanted
from positions.web.positions import Listed, One

Model = TypeVar("Model", bound=Parameters)


def _read(model: type[Model], *pairs: tuple[str, object]) -> Model:
    found, faults = parsed(model, MultiDict(pairs))
    assert isinstance(found, model), faults
    assert not faults
    return found


def _listed(*pairs: tuple[str, object]) -> Listed:
    return _read(Listed, *pairs)


def _faults(*pairs: tuple[str, object], model: type[Parameters] = Listed) -> dict[str, str]:
    return parsed(model, MultiDict(pairs))[1]


def test_everything_may_be_left_out() -> None:
    assert _listed() == Listed()
    assert Listed().limit == 1000


def test_every_parameter_is_read() -> None:
    assert _listed(
        ("asset", "btc-29dec26"),
        ("mode", "hedge"),
        ("size_min", "-1.5"),
        ("size_max", "1e3"),
        ("status", "closed"),
        ("limit", "7"),
    ) == Listed.model_construct(
        asset="BTC-29DEC26",
        mode=Mode.HEDGE,
        size_min=Decimal("-1.5"),
        size_max=Decimal(1000),
        status=Status.CLOSED,
        limit=7,
        cursor=None,
    )


@pytest.mark.parametrize(
    "asset", ["", "B", "-BTC", "BTC_USDT", "BTC/USDT", "a" * 41, "ßBTC", "BTC\n", "\u0131BTC", "\u0661\u0662"]
)
def test_what_is_no_symbol_is_refused(asset: str) -> None:
    assert list(_faults(("asset", asset))) == ["asset"]


@pytest.mark.parametrize(
    "number",
    ["", " ", "x", "NaN", "sNaN", "Infinity", "-inf", "1e400", "1e-400", "1e20", "1e-19", "1" * 21,
     "0." + "1" * 19, "1_000", "1,5", "0x10", " 1", "1 ", "\u0661", "1e", "--1", ".", "1" * 5000, "0" * 81],
)  # fmt: skip
def test_what_is_no_number_of_ours_is_refused(number: str) -> None:
    assert list(_faults(("size_min", number), ("size_max", number))) == ["size_min", "size_max"]


@pytest.mark.parametrize("number", ["0", "-0", ".5", "5.", "+1", "1e-18", "9" * 20, "-0." + "1" * 18, "1E2"])
def test_number_keeps_every_digit(number: str) -> None:
    assert _listed(("size_min", number)).size_min == Decimal(number)


@pytest.mark.parametrize("limit", ["", "0", "-1", "1001", "1.0", "1e2", "x", "9" * 100, "1_0", "\u0661"])
def test_limit_is_a_whole_number_up_to_a_thousand(limit: str) -> None:
    assert _faults(("limit", limit)) == {"limit": "must be a whole number from 1 to 1000"}


def test_every_wrong_parameter_is_named_at_once() -> None:
    faults = _faults(
        ("mode", "HEDGE"), ("status", "all"), ("limit", "0"), ("cursor", "x"), ("size", "1"), ("Asset", "BTC")
    )
    assert faults == {
        "mode": "must be 'one-way' or 'hedge'",
        "status": "must be 'open' or 'closed'",
        "limit": "must be a whole number from 1 to 1000",
        "cursor": "must be the next_cursor of an earlier answer",
        "size": "is not a parameter of this address",
        "Asset": "is not a parameter of this address",
    }


def test_parameter_given_twice_is_refused() -> None:
    assert _faults(("limit", "1"), ("limit", "1")) == {"limit": "is given more than once"}


def test_single_position_is_one_way_unless_said_otherwise() -> None:
    assert _read(OfAsset, ("asset", "btcusdt")).asset == "BTCUSDT"
    assert _read(One) == One.model_construct(mode=Mode.ONE_WAY, as_of=None)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2025-01-15T10:00:00Z", datetime(2025, 1, 15, 10, tzinfo=UTC)),
        ("2025-01-15T10:00:00", datetime(2025, 1, 15, 10, tzinfo=UTC)),
        ("2025-01-15 10:00:00.5", datetime(2025, 1, 15, 10, 0, 0, 500_000, tzinfo=UTC)),
        ("2025-01-15T12:00:00+02:00", datetime(2025, 1, 15, 10, tzinfo=UTC)),
        # A plus that nobody escaped.
        ("2025-01-15T12:00:00 02:00", datetime(2025, 1, 15, 10, tzinfo=UTC)),
        ("2025-01-15", datetime(2025, 1, 15, tzinfo=UTC)),
    ],
)
def test_moment_without_zone_is_utc(text: str, moment: datetime) -> None:
    assert _read(One, ("as_of", text)).as_of == moment


@pytest.mark.parametrize(
    "text", ["", "now", "1736935200", "2025-13-01", "0001-01-01T00:00:00+23:59", "2025-01-15T10:00:00Z\0"]
)
def test_what_is_no_moment_is_refused(text: str) -> None:
    assert list(_faults(("as_of", text), model=One)) == ["as_of"]


def test_value_of_a_body_may_be_of_any_type() -> None:
    assert _faults(("asset", 1), ("limit", None), ("size_min", [])) == dict.fromkeys(
        ("asset", "limit", "size_min"), "must be text"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("1", True), ("True", True), ("false", False), ("0", False), ("False", False)],
)
def test_flag(text: str, value: bool) -> None:
    assert _read(Wanted, ("include_positions", text)).include_positions is value


def test_wrong_flag_is_named() -> None:
    assert _faults(("include_positions", "2"), model=Wanted) == {"include_positions": "must be true or false"}


@given(asset=st.from_regex(r"[A-Z0-9][A-Z0-9-]{1,39}", fullmatch=True), mode=st.sampled_from(Mode))
def test_cursor_leads_back_to_its_position(asset: str, mode: Mode) -> None:
    key = PositionKey(asset, mode)
    assert _listed(("cursor", cursor_of(*key))).cursor == key


@example("BTC\x00USDT.hedge")
@example("BTCUSDT.hedge.x")
@example("BTCUSDT.spot")
@given(st.text(max_size=60))
def test_cursor_nobody_was_given_is_refused_or_harmless(text: str) -> None:
    found, faults = parsed(Listed, MultiDict([("cursor", text)]))
    if faults:
        return
    assert isinstance(found, Listed)
    assert found.cursor
    assert _read(OfAsset, ("asset", found.cursor.asset)).asset == found.cursor.asset
