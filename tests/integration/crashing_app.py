"""The service's processes with one fault: each of them is killed, once, at the point that CRASH_AT names.

CRASH_MARK is the path of a file that says that it has happened. CRASH_WHOLE: all processes of a worker die
with it. Run as a program it is the `positions` command.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery_app import app
from positions import cli
from positions.handlers import relay_outbox
from positions.storage import ledger, outbox
from positions.tasks import events, intake

_MARK = Path(os.environ["CRASH_MARK"])


def _die() -> None:
    try:
        _MARK.touch(exist_ok=False)
    except FileExistsError:
        return
    if os.environ.get("CRASH_WHOLE"):
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _dying(work: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not after:
            _die()
        result = work(*args, **kwargs)
        if after:
            _die()
        return result

    return wrapped


POINTS: dict[str, tuple[Any, str, bool]] = {
    # In the worker's pool: a transaction that is open, about to be committed, committed.
    "after the ledger insert": (ledger, "insert", True),
    "before the commit": (events, "apply_events", True),
    "after the commit": (events, "_apply", True),
    # In the worker's main process.
    "before the acknowledgement": (intake.Settlement, "acknowledge", False),
    "after the acknowledgement": (intake.Settlement, "acknowledge", True),
    # In the relay: confirmed but not deleted, deleted but not committed, committed.
    "after publishing": (relay_outbox._Confirmed, "publish", True),
    "before the outbox delete": (outbox, "delete", False),
    "after the outbox delete": (outbox, "delete", True),
}

if point := os.environ.get("CRASH_AT"):
    where, name, after = POINTS[point]
    setattr(where, name, _dying(getattr(where, name), after=after))

__all__ = ["app"]

if __name__ == "__main__":
    cli.main()
