"""What the API takes as a parameter, and how it says what it does not take."""

from __future__ import annotations

from base64 import b64encode
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from werkzeug.datastructures import MultiDict

from positions.domain.events import Mode, PositionKey
from positions.queries.positions import Status
from positions.web.parameters import BadParameters, cursor_of, parse
from positions.web.portfolio import Wanted
from positions.web.positions import Listed, One


def _listed(*pairs: tuple[str, str]) -> Listed:
    return parse(Listed, MultiDict(pairs), {})


def _faults(*pairs: tuple[str, str]) -> dict[str, str]:
    with pytest.raises(BadParameters) as raised:
        _listed(*pairs)
    return dict(raised.value.faults)


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
    with pytest.raises(BadParameters, match="asset: is given more than once"):
        parse(One, MultiDict([("asset", "ETHUSDT")]), {"asset": "BTCUSDT"})


def test_single_position_is_one_way_unless_said_otherwise() -> None:
    assert parse(One, MultiDict(), {"asset": "btcusdt"}) == One.model_construct(
        asset="BTCUSDT", mode=Mode.ONE_WAY
    )


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("false", False), ("0", False)])
def test_flag(text: str, value: bool) -> None:
    assert parse(Wanted, MultiDict([("include_positions", text)]), {}).include_positions is value


def test_wrong_flag_is_named() -> None:
    with pytest.raises(BadParameters, match=r"^include_positions: must be a valid boolean"):
        parse(Wanted, MultiDict([("include_positions", "2")]), {})


@given(asset=st.from_regex(r"[A-Z0-9][A-Z0-9-]{1,39}", fullmatch=True), mode=st.sampled_from(Mode))
def test_cursor_leads_back_to_its_position(asset: str, mode: Mode) -> None:
    key = PositionKey(asset, mode)
    assert _listed(("cursor", cursor_of(key))).cursor == key


@example(b64encode(b"BTC\x00USDT hedge").decode())
@example(b64encode(b"BTCUSDT hedge x").decode())
@example(b64encode(b"BTCUSDT spot").decode())
@given(st.text(max_size=60))
def test_cursor_nobody_was_given_is_refused_or_harmless(text: str) -> None:
    try:
        cursor = _listed(("cursor", text)).cursor
    except BadParameters:
        return
    assert cursor
    assert parse(One, MultiDict(), {"asset": cursor.asset}).asset == cursor.asset
