"""Which prices are to be believed."""

from datetime import datetime, timedelta
from decimal import Decimal

from positions.domain.position import Mark

JUMP = Decimal("1.25")
"""A price this many times another, or more, has jumped."""
FORGOTTEN_AFTER = timedelta(days=1)
"""What was worth so much then says nothing of what it is worth now."""


def near(one: Decimal, other: Decimal) -> bool:
    """Tell whether neither of two prices is a jump away from the other; to be asked inside `exact`."""
    low, high = sorted((one, other))
    return low > 0 and high < JUMP * low


def plausible(price: Decimal, at: datetime, known: Mark | None) -> bool:
    """Tell whether ``price`` is believed at once, or is to be read again; to be asked inside `exact`.

    Args:
        price: positive.
        at: its time.
        known: what the position was last valued at, or bought for; None where nothing is.
    """
    return known is None or at - known.at > FORGOTTEN_AFTER or near(price, known.price)
