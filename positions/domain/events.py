"""What can happen to a position: executions, order reports and exchange reports.

Quantities and prices are exact decimals in the asset's own units, money is in USDT, times are
timezone-aware UTC.
"""

from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import NamedTuple, Self

from positions.domain.numbers import ZERO
from positions.domain.values import value_class


class Word(StrEnum):
    """One of a few words; hashed as the text it is, for that of an enum is written in Python."""

    __hash__ = str.__hash__


class Mode(Word):
    """How the venue keeps a position: one signed size, or a long and a short leg side by side."""

    ONE_WAY = "one-way"
    HEDGE = "hedge"


class LegName(Word):
    """What fills fold into."""

    NET = "net"
    LONG = "long"
    SHORT = "short"


class TimeSource(Word):
    """Where the time of an event comes from; only the event's own is trusted to overrule fills."""

    EVENT = "event"
    AMQP = "amqp"
    ARRIVAL = "arrival"


class Kind(Word):
    """Kind of a ledger entry."""

    TRADE = "trade"
    FUNDING = "funding"
    ORDER_REPORT = "order_report"
    ADJUSTMENT = "adjustment"
    REPORT = "report"
    """An exchange report without a time of its own: the ledger keeps when it first arrived."""


class PositionKey(NamedTuple):
    """Identity of a position. The order of keys is the order in which positions are locked."""

    asset: str
    mode: Mode

    @classmethod
    def of(cls, asset: str, mode: str) -> Self:
        """Return the key of a stored position."""
        return cls(asset, Mode(mode))


@value_class(frozen=True, kw_only=True, slots=True)
class Entry:
    """One entry of the ledger.

    For a trade `quantity` is signed (sold is negative) and `price` is what one unit cost. For an order
    report both are *cumulative* for the order: signed filled quantity and average price. Funding has no
    quantity: `fee` is what was paid, negative when received.
    """

    key: str
    """Decides what is new: a second entry with this key is a duplicate."""
    position: PositionKey
    leg: LegName
    kind: Kind
    quantity: Decimal = ZERO
    price: Decimal = ZERO
    fee: Decimal | None = ZERO
    """Paid is positive, a rebate negative; cumulative in an order report, None where it does not say."""
    executed_at: datetime
    time_source: TimeSource = TimeSource.EVENT
    venue_seq: int | None = None
    order_id: str | None = None
    exec_type: str = "Trade"
    trace_id: str = ""
    size_after: Decimal | None = None
    """Of an adjustment: the signed size of the leg that it took over."""


@value_class(frozen=True, kw_only=True, slots=True)
class Report:
    """A position as the venue sees it. A field the venue left out is None and decides nothing."""

    id: str
    """Breaks ties between reports of the same time."""
    position: PositionKey
    leg: LegName
    at: datetime
    time_source: TimeSource = TimeSource.EVENT
    seq: int | None = None
    size: Decimal | None = None
    """Signed: a short is negative."""
    sided: bool = True
    """False where the venue gave a size without a side: long, unless the fills are short."""
    average: Decimal | None = None
    unrealized: Decimal | None = None
    realized: Decimal | None = None
    """Cumulative, for the life of the position."""
    mark: Decimal | None = None
    trace_id: str = ""


Event = Entry | Report
