"""The last answers of a process, to be given again as long as no position has changed."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Self

from positions.messages.outbound import Json, to_json

KEPT_S = 1.0
"""The few figures that follow from the time (minutes held, staleness) may be as old."""
KEPT_MAX_BYTES = 16 * 1024 * 1024
"""Of all answers a process keeps."""

ENTRY_BYTES = 3000
"""What an answer takes beside its body, with the longest question that is answered at all."""
TAG_CHARS = 24
TURNS = 64
TURN_S = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A body and what to compare it by."""

    body: bytes
    tag: str
    link: str | None = None
    """Header that leads to the next page."""
    vary: str | None = None
    """Header that names what of a request it depends on beside the address."""
    route: str | None = None
    """The pattern that its address matched, where it may be given again to whoever has a key."""
    shared: bool = False
    """Whether all processes share it through the cache."""

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Return ``data`` as JSON; the tag leaves out when it was calculated."""
        body = to_json(data).encode()
        return cls(body, tag_of(data) if "calculated_at" in data else _hash(body))


def tag_of(data: Mapping[str, Any]) -> str:
    """Return what tells ``data`` from other data, but for when it was calculated."""
    told = {name: each.digest if isinstance(each, Json) else each for name, each in data.items()}
    return _hash(to_json({**told, "calculated_at": None}).encode())


def _hash(told: bytes) -> str:
    return blake2b(told, digest_size=TAG_CHARS // 2).hexdigest()


class LastAnswers:
    """The last answers of a process, by question: each holds for one version of the portfolio."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[object, tuple[int, float, Answer]] = OrderedDict()
        self._bytes = 0
        self._turns = [threading.Lock() for _ in range(TURNS)]

    @contextmanager
    def turn(self, question: object) -> Iterator[None]:
        """Let one thread at a time make the answer to ``question``; the others look again when it has."""
        lock = self._turns[hash(question) % TURNS]
        # Who waited for so long does without.
        got = lock.acquire(timeout=TURN_S)
        try:
            yield
        finally:
            if got:
                lock.release()

    def get(self, question: object, version: int) -> Answer | None:
        """Return the answer to ``question`` at ``version`` or later, where it is kept and not too old."""
        found = self._kept.get(question)
        if found is None or found[0] < version or self._clock() - found[1] > KEPT_S:
            return None
        return found[2]

    def put(self, question: object, version: int, answer: Answer) -> None:
        """Keep an answer; those that were kept first make room."""
        with self._lock:
            self._drop(question)
            self._kept[question] = version, self._clock(), answer
            self._bytes += len(answer.body) + ENTRY_BYTES
            while self._bytes > KEPT_MAX_BYTES:
                self._drop(next(iter(self._kept)))

    def _drop(self, question: object) -> None:
        if gone := self._kept.pop(question, None):
            self._bytes -= len(gone[2].body) + ENTRY_BYTES
