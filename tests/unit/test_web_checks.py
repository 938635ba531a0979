"""How often broker and cache are asked, and how long an answer may take."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from positions.web.checks import KEPT_S, Recent, answers, queues_at


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_answer_is_kept_for_a_moment_only() -> None:
    now = 100.0
    asked: list[float] = []

    def ask() -> int:
        asked.append(now)
        return len(asked)

    recent = Recent(ask, clock=lambda: now)
    assert (recent(), recent()) == (1, 1)
    now += KEPT_S
    assert recent() == 1
    now += 0.001
    assert recent() == 2
    assert asked == [100.0, now]


def test_threads_share_one_answer() -> None:
    asked: list[int] = []
    together = threading.Barrier(8)
    answers_given: list[int] = []

    def ask() -> int:
        asked.append(1)
        time.sleep(0.05)  # long enough for every other thread to come by
        return 7

    recent = Recent(ask)

    def want() -> None:
        together.wait()
        answers_given.append(recent())

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers_given == [7] * 8
    assert len(asked) == 1


@pytest.mark.parametrize("scheme", ["amqp", "redis"])
@pytest.mark.parametrize("silent", [True, False], ids=["silent", "closed"])
def test_broker_that_does_not_answer_is_given_up_soon(scheme: str, silent: bool, silent_port: int) -> None:
    url = f"{scheme}://guest:guest@127.0.0.1:{silent_port if silent else 1}/0"
    queues_at(url, [])  # imports the transport, which takes its time
    began = time.perf_counter()
    assert queues_at(url, ["ws-gateway.position"]) is None
    assert time.perf_counter() - began < 1.5


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "closed"])
def test_cache_that_does_not_answer_is_given_up_soon(silent: bool, silent_port: int) -> None:
    began = time.perf_counter()
    assert not answers(f"redis://127.0.0.1:{silent_port if silent else 1}/0")
    assert time.perf_counter() - began < 1.5
