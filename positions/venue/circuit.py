"""When the venue may be asked, and when it is left alone: a decision without clock and without I/O."""

from dataclasses import dataclass, replace
from typing import Self

OPENS_AFTER = 4
"""So many tries in a row fail before the venue is left alone: those of one call."""
FIRST_S = 30.0
LONGEST_S = 120.0


@dataclass(frozen=True, slots=True)
class Circuit:
    """How the last tries went. Moments are seconds of one clock that never goes back."""

    failures: int = 0
    """In a row."""
    closed_until: float = 0.0
    """Nobody is let through before."""

    def admit(self, now: float, *, try_s: float) -> Self | None:
        """Return the circuit after it let one try through, or None where it does not.

        After a rest one caller alone may try, and has ``try_s`` for it; the others wait for what it finds.
        """
        if now < self.closed_until:
            return None
        return self if self.failures < OPENS_AFTER else replace(self, closed_until=now + try_s)

    def failed(self, now: float) -> Self:
        """Return the circuit after a try that failed: each one after `OPENS_AFTER` doubles the rest."""
        failures = self.failures + 1
        if failures < OPENS_AFTER:
            return replace(self, failures=failures)
        doubled = min(failures - OPENS_AFTER, 10)
        return replace(self, failures=failures, closed_until=now + min(FIRST_S * 2**doubled, LONGEST_S))

    def paused(self, until: float) -> Self:
        """Return the circuit after the venue asked to be left alone until then."""
        return replace(self, closed_until=max(self.closed_until, until))
