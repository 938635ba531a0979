"""A file that a process touches as long as it gets on, for probes of a container to look at.

`POSITION_MANAGER_ALIVE_FILE` names it. It is touched by the loop that does the work and by no thread beside
it, which would go on while the loop hangs.
"""

import time
from collections.abc import Callable
from pathlib import Path

EVERY_S = 5.0
"""How often the file is touched."""


def touching(path: str | None) -> Callable[[], None]:
    """Return what touches the file at ``path``, at most every `EVERY_S`; nothing where there is no path.

    An error is the caller's: who asked for the file and cannot have it is to know at start.
    """
    if path is None:
        return lambda: None
    file, next_at = Path(path), 0.0

    def touch() -> None:
        nonlocal next_at
        if (now := time.monotonic()) >= next_at:
            file.touch()
            next_at = now + EVERY_S

    touch()
    return touch
