"""The worked numbers of the domain rules, to all digits shown."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import permutations

import pytest

from positions.domain.events import Entry, Kind, LegName, Mode, PositionKey, Report
from positions.domain.figures import Figures, figures
from positions.domain.numbers import exact, plain
from positions.domain.orders import fills_of
from positions.domain.position import Policy, empty, refolded, with_report

START = datetime(2025, 1, 15, 10, tzinfo=UTC)
NET = PositionKey("BTCUSDT", Mode.ONE_WAY)
HEDGE = PositionKey("BTCUSDT", Mode.HEDGE)


def trades(*texts: str, key: PositionKey = NET) -> list[Entry]:
    """Return entries from texts like ``"B .5@5000 f1.375"``; in hedge mode ``"long B 100@50"``."""
    made = []
    for number, text in enumerate(texts):
        leg = LegName.NET
        if key.mode is Mode.HEDGE:
            name, text = text.split(" ", 1)  # noqa: PLW2901
            leg = LegName(name)
        side, rest, *fee = text.split()
        quantity, price = map(Decimal, rest.split("@"))
        made.append(
            Entry(
                key=f"exec:{number}",
                position=key,
                leg=leg,
                kind=Kind.TRADE,
                quantity=quantity if side == "B" else -quantity,
                price=price,
                fee=Decimal(fee[0][1:]) if fee else Decimal(0),
                executed_at=START + timedelta(seconds=number),
            )
        )
    return made


def folded(entries: list[Entry], mark: str | None = None, key: PositionKey = NET) -> Figures:
    state = empty(key)
    if mark:
        at = START + timedelta(days=1)
        leg = LegName.NET if key.mode is Mode.ONE_WAY else LegName.LONG
        state = with_report(state, Report(id="mark", position=key, leg=leg, at=at, mark=Decimal(mark)))
    with exact():
        return figures(refolded(state, fills_of(entries), Policy())[0])


ONE = ("B .5@5000 f1.375", "B .3@6000 f.99")
TWO = (*ONE, "S .2@7000 f.77")
THREE = (*TWO, "S .6@5200 f1.716")


@pytest.mark.parametrize(
    ("fills", "mark", "size", "average", "gross", "net", "unrealized"),
    [
        pytest.param(ONE, "7500", "0.8", "5375", "0", "-2.365", "1700", id="1"),
        pytest.param(TWO, "7500", "0.6", "5375", "325", "321.865", "1275", id="2"),
        pytest.param(THREE, "7500", "0", None, "220", "215.149", "0", id="3"),
        pytest.param(
            ("B 1@100 f.055", "S 1.5@110 f.09075"), "105", "-0.5", "110", "10", "9.85425", "2.5", id="4"
        ),
        pytest.param(
            ("S .1@50000 f5", "B .2@40000 f10"), "41000", "0.1", "40000", "1000", "985", "100", id="5"
        ),
        pytest.param(
            ("B .1@50000 f5", "S .05@60000 f2.5"), "60000", "0.05", "50000", "500", "492.5", "500", id="6"
        ),
        pytest.param(("B 1@10000 f-1", "S 1@10000 f5.5"), None, "0", None, "0", "-4.5", "0", id="7"),
        pytest.param(("S 1@100", "S 1@110"), "100", "-2", "105", "0", "0", "10", id="8"),
        pytest.param(
            ("B 1@48000", "B .5@50000"), None, "1.5", "48666.666666666666666667", "0", "0", "0", id="12"
        ),
        pytest.param(
            ("B 2@50000", "S .5@51000 f25.5"), "51000", "1.5", "50000", "500", "474.5", "1500", id="13"
        ),
    ],
)
def test_one_way_position(
    fills: tuple[str, ...],
    mark: str | None,
    size: str,
    average: str | None,
    gross: str,
    net: str,
    unrealized: str,
) -> None:
    found = folded(trades(*fills), mark)
    assert plain(found.size) == size
    assert (found.average_entry_price and plain(found.average_entry_price)) == average
    assert plain(found.realized_gross) == gross
    assert plain(found.realized_pnl) == net
    assert plain(found.unrealized_pnl) == unrealized


def test_9_fees_in_percent_and_funding_paid() -> None:
    entries = trades("S .4@6000 f1.32", "B .4@5000 f1.10")
    funding = replace(
        entries[0], key="exec:funding", kind=Kind.FUNDING, quantity=Decimal(0), fee=Decimal("2.10")
    )
    found = folded([*entries, funding])
    assert plain(found.size) == "0"
    assert plain(found.realized_gross) == "400"
    assert plain(found.realized_pnl) == "395.48"
    assert plain(found.funding_received) == "-2.1"


def test_10_any_arrival_order_folds_the_same() -> None:
    entries = trades("B 1@100", "S 1@110", "B 1@120")
    for arrived in permutations(entries):
        found = folded(list(arrived), "120")
        assert plain(found.size) == "1"
        assert found.average_entry_price is not None
        assert plain(found.average_entry_price) == "120"
        assert plain(found.realized_gross) == plain(found.realized_pnl) == "10"
        assert plain(found.unrealized_pnl) == "0"


def test_11_hedge_legs_side_by_side() -> None:
    fills = ("long B 100@50", "long S 100@55", "short S 50@54", "short B 50@52")
    found = folded(trades(*fills, key=HEDGE), key=HEDGE)
    assert plain(found.long_size) == plain(found.short_size) == plain(found.size) == "0"
    assert plain(found.realized_gross) == plain(found.realized_pnl) == "600"


@pytest.mark.parametrize("order", list(permutations(range(2))))
def test_cumulative_order_reports_imply_the_fills_between_them(order: tuple[int, ...]) -> None:
    first = replace(trades("B .3@100 f.03")[0], kind=Kind.ORDER_REPORT, order_id="A", key="order:A:0.3")
    second = replace(
        trades("B 1@107 f.10")[0],
        kind=Kind.ORDER_REPORT,
        order_id="A",
        key="order:A:1",
        executed_at=START + timedelta(seconds=1),
    )
    reports = [first, second]
    with exact():
        fills = fills_of([reports[index] for index in order])
    assert [(plain(fill.quantity), plain(fill.notional), plain(fill.fee)) for fill in fills] == [
        ("0.3", "30", "0.03"),
        ("0.7", "77", "0.07"),
    ]
    found = folded([reports[index] for index in order])
    assert plain(found.size) == "1"
    assert found.average_entry_price is not None
    assert plain(found.average_entry_price) == "107"
    assert plain(found.realized_pnl) == "-0.1"
