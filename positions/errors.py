"""The errors of the service, one small tree.

What each means for a batch of events stands in :mod:`positions.tasks.intake`; what it means for HTTP, in
:mod:`positions.web.problems`.
"""

from collections.abc import Sequence


class PositionsError(Exception):
    """Base of every error the service raises on purpose."""


class InvalidEvent(PositionsError):
    """A message that can never be applied as it is: it goes to quarantine with this reason."""

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(f"{field}: {reason}" if field else reason)
        self.reason = reason
        self.field = field
        self.trace_id = ""


class NotFound(PositionsError):
    """What was asked for does not exist."""


class ConcurrencyConflict(PositionsError):
    """Another writer changed the position first: the caller's version is no longer the stored one."""


class DeepRefold(PositionsError):
    """Positions for which something came so late that folding them anew would hold up their neighbours."""

    def __init__(self, positions: Sequence[tuple[str, str]]) -> None:
        super().__init__(", ".join(" ".join(key) for key in positions))
        self.positions = positions


class Suspected(PositionsError):
    """Messages that were begun before and did not end, perhaps as their worker did.

    `tried` says of each, by digest, how often it was begun apart from others.
    """

    def __init__(self, tried: dict[str, int]) -> None:
        super().__init__(tried)
        self.tried = tried

    def __str__(self) -> str:
        return f"{len(self.tried)} messages were begun before and did not end"

    __repr__ = __str__  # logged, and there may be thousands


class Unavailable(PositionsError):
    """Database, broker or cache cannot be reached now; the same call may succeed later."""


class VenueError(PositionsError):
    """Base of what goes wrong when the exchange's own API is asked."""


class VenueUnavailable(VenueError):
    """The exchange cannot be reached, answers nonsense, or has asked to be left alone for a while."""


class VenueRefused(VenueError):
    """The exchange understood what was asked, and refused: an unknown symbol, a wrong key."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
