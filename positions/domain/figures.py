"""The figures a position and a portfolio are read by, derived from their state.

Money in USDT, sizes in the asset's own units, all rounded once to 18 decimals.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from decimal import Decimal

from positions.domain.events import LegName
from positions.domain.leg import Leg
from positions.domain.numbers import ZERO, quotient, rounded
from positions.domain.position import Held, Mark, State
from positions.domain.reports import newest
from positions.domain.values import value_class

HUNDRED = Decimal(100)
_FLAT = Leg()


@value_class(frozen=True, kw_only=True, slots=True)
class Figures:
    """What is stored of a position and shown to its readers."""

    size: Decimal
    average_entry_price: Decimal | None
    """None when flat, and in hedge mode while both legs are open."""
    current_price: Decimal | None
    current_price_at: datetime | None
    current_price_source: str | None
    unrealized_pnl: Decimal
    """0 when flat, and until a price is known."""
    realized_pnl: Decimal
    """realized_gross - fees_paid + funding_received + realized_adjustment, exactly."""
    realized_gross: Decimal
    fees_paid: Decimal
    funding_received: Decimal
    realized_adjustment: Decimal
    """What the venue's realized PnL adds to the ledger's."""
    long_size: Decimal
    short_size: Decimal
    long_avg_price: Decimal | None
    short_avg_price: Decimal | None
    opened_at: datetime | None
    closed_at: datetime | None


def figures(state: State) -> Figures:
    """Return the figures of ``state``. Must run inside :func:`positions.domain.numbers.exact`."""
    mark, held = state.mark, state.held
    unrealized = [_unrealized(state, name, each, mark) for name, each in held.items()]
    if net := held.get(LegName.NET):
        whole, venue_realized = net.leg, net.venue_realized
        long, short = (whole, _FLAT) if whole.size > 0 else (_FLAT, whole)
        opened_at, closed_at = whole.opened_at, whole.closed_at
    else:
        long, short = held[LegName.LONG].leg, held[LegName.SHORT].leg
        venue_realized = held[LegName.LONG].venue_realized + held[LegName.SHORT].venue_realized
        whole = Leg(
            gross=long.gross + short.gross, fees=long.fees + short.fees, funding=long.funding + short.funding
        )
        opened_at = min((leg.opened_at for leg in (long, short) if leg.opened_at), default=None)
        closed_at = max((leg.closed_at for leg in (long, short) if leg.closed_at), default=None)
    long_average, short_average = _average(long), _average(short)
    gross = rounded(whole.gross)
    # One rounding: fees and funding have 18 decimals already, so the parts sum to the whole exactly.
    own = rounded(whole.gross + venue_realized) if venue_realized else gross
    return Figures(
        size=long.size + short.size,
        average_entry_price=None if long.size and short.size else long_average or short_average,
        current_price=mark.price if mark else None,
        current_price_at=mark.at if mark else None,
        current_price_source=mark.source if mark else None,
        unrealized_pnl=sum(unrealized, ZERO),
        realized_pnl=own - whole.fees + whole.funding,
        realized_gross=gross,
        fees_paid=whole.fees,
        funding_received=whole.funding,
        realized_adjustment=own - gross,
        long_size=long.size,
        short_size=short.size,
        long_avg_price=long_average,
        short_avg_price=short_average,
        opened_at=opened_at,
        closed_at=None if opened_at else closed_at,
    )


def _average(leg: Leg) -> Decimal | None:
    return leg.average if leg.cost else None


def _unrealized(state: State, name: LegName, held: Held, mark: Mark | None) -> Decimal:
    """Return the unrealized PnL of a leg: the venue's until a newer mark or fill, then computed."""
    leg = held.leg
    if not leg.size:
        return ZERO
    report = newest((each for each in state.reports if each.leg is name), "unrealized")
    if report is not None and report.unrealized is not None and held.disputed != report.id:
        traded_at = state.ledger[name].traded_at
        if (mark is None or mark.at <= report.at) and (traded_at is None or traded_at <= report.at):
            return report.unrealized
    if mark is None or not leg.cost:
        return ZERO
    return rounded(leg.size * mark.price - (leg.cost if leg.size > 0 else -leg.cost))


def position_exposure(size: Decimal, price: Decimal | None) -> Decimal | None:
    """Return what ``size`` (absolute) is worth; 0 when flat, None where there is no price.

    Every digit is kept, so that parts sum to the whole.
    """
    if not size:
        return ZERO
    return None if price is None else size * price


def unrealized_pct(
    unrealized: Decimal, size: Decimal, average: Decimal | None, gross_exposure: Decimal | None
) -> Decimal | None:
    """Return the unrealized PnL in percent of the entry value, else of the gross exposure; 0 when flat.

    None only where neither an average nor a price is known.
    """
    entry = abs(size) * average if average is not None else gross_exposure
    if entry is None:
        return None
    return quotient(unrealized * HUNDRED, entry) if entry else ZERO


def size_norm(own: Decimal | None, portfolio: Decimal) -> Decimal | None:
    """Return a position's share of the portfolio's gross exposure; 0 when flat, None when unpriced."""
    if own is None:
        return None
    return quotient(own, portfolio) if portfolio else ZERO


def is_stale(price_at: datetime | None, now: datetime, after: timedelta) -> bool:
    """Tell whether a price is older than ``after``; one of unknown time is."""
    return price_at is None or now - price_at > after


def minutes_held(opened_at: datetime | None, now: datetime) -> int:
    """Return the whole minutes since the present cycle opened; 0 when flat."""
    return max(0, int((now - opened_at).total_seconds() // 60)) if opened_at else 0


def total(amounts: Iterable[Decimal | None]) -> Decimal:
    """Return the exact sum of the amounts that are known."""
    return sum((amount for amount in amounts if amount is not None), ZERO)
