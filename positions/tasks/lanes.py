"""What waits for its batch, in lanes: each has the messages of some of the positions.

A batch pays for each position that it is about, and for each message. So messages of one position should
travel together, and two processes should not have batches of the same one at a time: the second would wait
for the lock, and read anew what it had kept. Each process of the pool has its turn, and each turn a few
lanes: while one of them is applied the others fill, so that a batch is short for the messages that it joins.

Which lane a message waits in is told by its text, undecoded. Nothing depends on it but speed, and a batch
that is slow, say because it waits for a lock, holds up the others of its turn for `PATIENCE_S` and no longer.
"""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from positions.messages.inbound import Delivery, named_asset

BATCH_BYTES_MAX = 4_000_000
"""A batch is also full at this size: it travels through a pipe to the pool in one piece."""
LANES = 2
"""So many lanes has each turn."""
TOGETHER = 50
"""So few messages of several lanes travel together: a transaction has its price too."""
PATIENCE_S = 0.5
"""A lane that has waited so long is served whoever has its turn."""
ASSETS_MAX = 10_000
"""Of so many assets it is remembered which lane they are in."""
NAME_MAX = 40
"""So many bytes of what is likely its name."""


class Served(NamedTuple):
    """What a batch is made of."""

    messages: list[Delivery]
    tags: list[Any]
    turn: int
    """Of the lane that it is, or of the first where a few of several lanes are together."""


class _Lane:
    def __init__(self, turn: int) -> None:
        self.turn = turn
        self.messages: list[Delivery] = []
        self.tags: list[Any] = []
        self.bytes = 0
        self.since = 0.0
        """When the first of them came, or those before it were served."""


class Lanes:
    """All lanes of a worker."""

    def __init__(
        self, turns: int, *, batch_size: int, wait_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Make them.

        Args:
            turns: as many as the pool has processes.
            batch_size: messages in a batch at most.
            wait_s: how long a message waits for others, where a process is free.
            clock: tells the time, in seconds.
        """
        self.prefetch = batch_size * turns * LANES * 2
        """So many messages may be here: two batches of each lane, one that is applied and one that fills."""
        self.turns = turns
        self._lanes = [_Lane(number % turns) for number in range(turns * LANES)]
        self._lane_of: dict[bytes, _Lane] = {}
        self._batch_size, self._wait_s, self._clock = batch_size, wait_s, clock

    def due_in_s(self) -> float | None:
        """Return after how many seconds to look again; None where no lane waits for time alone.

        That is when the next lane is due, and no later than a message that comes now would be.
        """
        now = self._clock()
        since = [lane.since for lane in self._lanes if lane.messages]
        waits = (each + wait_s - now for each in since for wait_s in (self._wait_s, PATIENCE_S))
        soonest = min((wait for wait in waits if wait > 0), default=None)
        return None if soonest is None else min(soonest, self._wait_s)

    def put(self, message: Delivery, tag: Any) -> bool:
        """Let a message wait; return whether its lane is full."""
        asset = named_asset(message.body)[:NAME_MAX]
        lane = self._lane_of.get(asset)
        if lane is None:
            if len(self._lane_of) >= ASSETS_MAX:
                self._lane_of.clear()
            # In turn, so that the busiest of a few assets are not in one lane by chance.
            lane = self._lane_of[asset] = self._lanes[len(self._lane_of) % len(self._lanes)]
        if not lane.messages:
            lane.since = self._clock()
        lane.messages.append(message)
        lane.tags.append(tag)
        lane.bytes += len(message.body)
        return self._full(lane)

    def serve(self, busy: Collection[int]) -> Served | None:
        """Return the next batch, and let it wait no more; None where nothing is due.

        That is the lane that has waited longest, and others with it where all of them are few. A lane whose
        turn is ``busy`` is served only when it is full, or has waited for `PATIENCE_S`.
        """
        waiting = sorted((lane for lane in self._lanes if lane.messages), key=lambda lane: lane.since)
        first = next((lane for lane in waiting if self._is_due(lane, busy)), None)
        if first is None:
            return None
        served = Served([], [], first.turn)
        self._cut(first, served)
        size = sum(len(message.body) for message in served.messages)
        few = min(TOGETHER, self._batch_size)
        for lane in waiting:
            together = len(served.messages) + len(lane.messages)
            if lane.messages and lane.turn not in busy and together <= few:
                size += lane.bytes
                if size > BATCH_BYTES_MAX:
                    break
                self._cut(lane, served)
        return served

    def _is_due(self, lane: _Lane, busy: Collection[int]) -> bool:
        if self._full(lane):
            return True
        waited_s = self._clock() - lane.since
        return waited_s >= (PATIENCE_S if lane.turn in busy else self._wait_s)

    def _full(self, lane: _Lane) -> bool:
        return len(lane.messages) >= self._batch_size or lane.bytes >= BATCH_BYTES_MAX

    def _cut(self, lane: _Lane, served: Served) -> None:
        length = fitting(lane.messages, self._batch_size)
        served.messages.extend(lane.messages[:length])
        served.tags.extend(lane.tags[:length])
        del lane.messages[:length], lane.tags[:length]
        lane.bytes = sum(len(message.body) for message in lane.messages)
        lane.since = self._clock()


def fitting(messages: Sequence[Delivery], batch_size: int) -> int:
    """Return how many of ``messages``, from the first, fit into a batch."""
    size = length = 0
    for message in messages[:batch_size]:
        if length and size + len(message.body) > BATCH_BYTES_MAX:
            break
        size, length = size + len(message.body), length + 1
    return length
