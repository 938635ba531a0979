"""Folding fills into one leg of a position: the arithmetic of domain rules, exact.

Every function here must run inside :func:`positions.domain.numbers.exact`.
"""

from dataclasses import replace
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
        leg = replace(
            self,
            fees=self.fees + fill.fee,
            funding=self.funding + fill.funding,
            traded_at=fill.order.at if fill.quantity else self.traded_at,
            certain_at=fill.order.at if fill.quantity and not fill.implied else self.certain_at,
            touched_at=fill.order.at,
        )
        size, quantity, at = self.size, fill.quantity, fill.order.at
        if not quantity:
            return leg
        if fill.leg is not LegName.NET and (quantity > 0) is not (fill.leg is LegName.LONG):
            closing = min(abs(quantity), abs(size))
            leg = replace(leg, missing=leg.missing + abs(quantity) - closing)
            if not closing:
                return leg
            notional = proportion(fill.notional, closing, abs(quantity))
            return leg.reduced(closing, notional, at)
        if not size or (size > 0) is (quantity > 0):
            return replace(
                leg,
                size=size + quantity,
                cost=self.cost + fill.notional,
                opened_at=self.opened_at if size else at,
                closed_at=None,
            )
        if abs(quantity) <= abs(size):
            return leg.reduced(abs(quantity), fill.notional, at)
        closing_notional = proportion(fill.notional, abs(size), abs(quantity))
        closed = leg.reduced(abs(size), closing_notional, at)
        return replace(
            closed,
            size=size + quantity,
            cost=fill.notional - closing_notional,
            opened_at=at,
            closed_at=None,
        )

    def reduced(self, quantity: Decimal, notional: Decimal, at: datetime) -> Self:
        """Return the leg with ``quantity`` (absolute, at most its size) closed for ``notional``."""
        whole = abs(self.size)
        cost = self.cost if quantity == whole else proportion(self.cost, quantity, whole)
        gain = notional - cost
        flat = quantity == whole
        return replace(
            self,
            size=ZERO if flat else self.size - quantity.copy_sign(self.size),
            cost=self.cost - cost,
            gross=self.gross + (gain if self.size > 0 else -gain),
            opened_at=None if flat else self.opened_at,
            closed_at=at if flat else None,
        )
