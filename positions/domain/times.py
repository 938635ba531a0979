"""Points in time as text."""

from datetime import UTC, datetime
from functools import lru_cache


@lru_cache(maxsize=10_000)
def utc_text(at: datetime) -> str:
    """Return a time as ISO 8601 in UTC, ending in Z.

    Kept, since it takes longer than all arithmetic with a figure, and a batch writes the same times again and
    again: in rows, in states and in events.
    """
    return at.astimezone(UTC).isoformat().removesuffix("+00:00") + "Z"
