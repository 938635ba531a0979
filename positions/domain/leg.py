"""Folding fills into one leg of a position: the arithmetic of domain rules, exact.

Every function here must run inside :func:`positions.domain.numbers.exact`.
"""

from datetime import datetime
from decimal import Decimal
from typing import NamedTuple, Self

from positions.domain.events import LegName
from positions.domain.numbers import ZERO, proportion, quotient
from positions.domain.values import value_class


class FillOrder(NamedTuple):
    """The order of fills: time, then the venue's sequence where given (-1 where not), then key."""

    at: datetime
    seq: int
    key: str


@value_class(frozen=True, slots=True)
class Fill:
    """One change of a leg: a trade, or a funding payment (quantity 0)."""

    order: FillOrder
    leg: LegName
    quantity: Decimal
    notional: Decimal
    """abs(quantity) x price: kept as such, since an order report implies a notional, not a price."""
    fee: Decimal
    funding: Decimal
    implied: bool = False
    """Told by an order report: an execution of the order takes its place."""


@value_class(frozen=True, slots=True)
class Leg:
    """State of a leg; its average entry price is ``cost / abs(size)``."""

    size: Decimal = ZERO
    cost: Decimal = ZERO
    gross: Decimal = ZERO
    """Realized PnL before fees and funding."""
    fees: Decimal = ZERO
    funding: Decimal = ZERO
    """Received is positive, paid is negative."""
    missing: Decimal = ZERO
    """Quantity (absolute) that hedge-mode reductions closed beyond what the leg held: fills are missing."""
    opened_at: datetime | None = None
    closed_at: datetime | None = None
    traded_at: datetime | None = None
    """Time of the last trade folded."""
    certain_at: datetime | None = None
    """Time of the last one that nothing takes back: of an execution."""
    touched_at: datetime | None = None
    """Time of the last entry folded, funding included."""

    @property
    def average(self) -> Decimal | None:
        """Average entry price, rounded to 18 decimals; None when flat."""
        return quotient(self.cost, abs(self.size)) if self.size else None

    def fold(self, fill: Fill) -> Self:
        """Return the leg after ``fill``.

        An increase adds to the cost; a reduction takes its share of the cost with it, so that the average
        does not move; in one-way mode a fill larger than the position closes it and opens the rest on the
        other side at the fill's price. A hedge leg never goes through zero: the excess is `missing`.
        """
        at, quantity, notional = fill.order.at, fill.quantity, fill.notional
        size, cost, gross, missing = self.size, self.cost, self.gross, self.missing
        opened_at, closed_at = self.opened_at, self.closed_at
        amount, whole = abs(quantity), abs(size)
        if fill.leg is not LegName.NET and amount and (quantity > 0) is not (fill.leg is LegName.LONG):
            closing = min(amount, whole)
            missing += amount - closing
            notional = proportion(notional, closing, amount)
            quantity, amount = closing.copy_sign(quantity), closing
        if amount and (not size or (size > 0) is (quantity > 0)):
            size, cost = size + quantity, cost + notional
            opened_at, closed_at = opened_at if whole else at, None
        elif amount:
            closed_for = notional if amount <= whole else proportion(notional, whole, amount)
            entered_for = cost if amount >= whole else proportion(cost, amount, whole)
            gain = closed_for - entered_for
            gross += gain if size > 0 else -gain
            size, cost = size + quantity, cost - entered_for
            if amount == whole:
                opened_at, closed_at = None, at
            else:
                closed_at = None
            if amount > whole:
                cost, opened_at = notional - closed_for, at
        # Written out: `dataclasses.replace` takes ten times as long, and this is done for every fill.
        return type(self)(
            size=size,
            cost=cost,
            gross=gross,
            fees=self.fees + fill.fee,
            funding=self.funding + fill.funding,
            missing=missing,
            opened_at=opened_at,
            closed_at=closed_at,
            traded_at=at if fill.quantity else self.traded_at,
            certain_at=at if fill.quantity and not fill.implied else self.certain_at,
            touched_at=at,
        )
