"""What waits for its batch: all of it is served once, and what belongs together goes together."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from positions.messages.inbound import Delivery, named_asset
from positions.tasks.lanes import BATCH_BYTES_MAX, LANES, PATIENCE_S, TOGETHER, Lanes, Served

NOW = datetime(2025, 1, 15, 10, tzinfo=UTC)
WAIT_S = 0.125  # added up without an error


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def message(asset: str, *, size: int = 0) -> Delivery:
    return Delivery("queue", json.dumps({"asset": asset, "padding": "x" * size}).encode(), {}, {}, NOW)


def lanes(turns: int = 2, batch_size: int = 2000) -> tuple[Lanes, Clock]:
    clock = Clock()
    return Lanes(turns, batch_size=batch_size, wait_s=WAIT_S, clock=clock), clock


def assets_of(served: Served) -> set[bytes]:
    return {named_asset(each.body) for each in served.messages}


@given(
    steps=st.lists(
        st.tuples(st.sampled_from("ABCDEFGH"), st.sampled_from([0.0, 0.125, 0.25, 1.0]), st.booleans()),
        max_size=60,
    ),
    turns=st.integers(1, 3),
    batch_size=st.integers(1, 8),
)
def test_every_message_is_served_once_in_order_and_those_of_a_turn_one_after_the_other(
    steps: list[tuple[str, float, bool]], turns: int, batch_size: int
) -> None:
    waiting, clock = lanes(turns, batch_size)
    came: dict[int, float] = {}
    begun: list[Served] = []
    served: list[Served] = []

    def serve() -> bool:
        busy = {each.turn for each in begun}
        batch = waiting.serve(busy)
        if batch is None:
            return False
        assert len(batch.messages) == len(batch.tags) <= batch_size
        late = clock.now - min(came[tag] for tag in batch.tags) >= PATIENCE_S
        assert batch.turn not in busy or len(batch.messages) == batch_size or late
        begun.append(batch)
        served.append(batch)
        return True

    for number, (asset, later, ends) in enumerate(steps):
        waiting.put(message(asset), number)
        came[number] = clock.now
        clock.now += later
        if len(begun) < turns:
            serve()
        if ends and begun:
            begun.pop(0)
    begun.clear()
    clock.now += WAIT_S
    while serve():
        begun.clear()
        clock.now += WAIT_S  # what a batch left of its lane waits for others again
    tags = [tag for batch in served for tag in batch.tags]
    assert sorted(tags) == list(range(len(steps)))
    for asset in "ABCDEFGH":
        own = [tag for tag in tags if steps[tag][0] == asset]
        assert own == sorted(own)


def test_a_message_waits_for_others_and_then_no_longer() -> None:
    waiting, clock = lanes()
    assert waiting.due_in_s() is None
    waiting.put(message("BTCUSDT"), 1)
    clock.now += WAIT_S / 2
    waiting.put(message("ETHUSDT"), 2)
    assert waiting.serve(set()) is None
    assert waiting.due_in_s() == WAIT_S / 2
    clock.now += WAIT_S / 2
    served = waiting.serve(set())
    assert served is not None
    assert served.tags == [1, 2]  # so few go along
    assert waiting.due_in_s() is None


def test_few_messages_of_all_lanes_go_together_and_many_apart() -> None:
    waiting, clock = lanes()
    for number in range(TOGETHER):
        waiting.put(message(f"A{number}USDT"), number)
    clock.now += WAIT_S
    few = waiting.serve(set())
    assert few is not None
    assert len(few.tags) == TOGETHER
    for number in range(20 * TOGETHER):
        waiting.put(message(f"A{number % 100}USDT"), number)
    clock.now += WAIT_S
    batches = []
    while many := waiting.serve(set()):
        batches.append(many)
    assert len(batches) == 2 * LANES
    assert [each.turn for each in batches] == [0, 1] * LANES
    for one, other in pairwise(batches):
        assert assets_of(one).isdisjoint(assets_of(other))


def test_positions_that_a_process_has_wait_for_it_until_they_fill_a_batch() -> None:
    waiting, clock = lanes(turns=2, batch_size=100)
    waiting.put(message("BTCUSDT"), 0)
    clock.now += WAIT_S
    begun = waiting.serve(set())
    assert begun is not None
    full = [waiting.put(message("BTCUSDT"), number) for number in range(1, 101)]
    assert full == [False] * 99 + [True]
    clock.now += WAIT_S
    served = waiting.serve({begun.turn})
    assert served is not None
    assert len(served.tags) == 100
    waiting.put(message("BTCUSDT"), 101)
    clock.now += WAIT_S
    assert waiting.serve({begun.turn}) is None


def test_a_batch_that_is_slow_holds_up_others_only_for_so_long() -> None:
    waiting, clock = lanes()
    for number in range(40):
        waiting.put(message(f"A{number}USDT"), number)
    clock.now += WAIT_S
    slow = waiting.serve(set())
    assert slow is not None
    for number in range(40):
        waiting.put(message(f"A{number}USDT"), number)
    clock.now += WAIT_S
    others = waiting.serve({slow.turn})
    assert others is not None
    assert others.turn != slow.turn
    assert waiting.serve({slow.turn}) is None
    # It could look again when they are due, but another message may come before that.
    assert waiting.due_in_s() == WAIT_S < PATIENCE_S - WAIT_S
    clock.now += PATIENCE_S - WAIT_S
    rest = waiting.serve({slow.turn})
    assert rest is not None
    assert len(others.tags) + len(rest.tags) <= 40


def test_an_asset_that_is_nearly_all_of_the_traffic_does_not_starve_the_others() -> None:
    waiting, clock = lanes(turns=2, batch_size=10)
    for number in range(2 * LANES):
        waiting.put(message(f"A{number}USDT"), number)
    clock.now += WAIT_S
    while waiting.serve(set()):
        pass
    waiting.put(message("A2USDT"), -1)  # of the same turn as A0USDT, in another lane
    served = []
    for _ in range(20):
        for number in range(20):
            waiting.put(message("A0USDT"), number)
        clock.now += PATIENCE_S / 16
        # Each process has a batch of the busy asset, and the next begins before the other has ended.
        if batch := waiting.serve({0}):
            served.append(batch.tags)
    assert [-1] in served[:17]


def test_a_few_assets_are_spread_over_all_lanes() -> None:
    waiting, clock = lanes()
    for number in range(10 * TOGETHER * LANES * 2):
        waiting.put(message(f"A{number % (LANES * 2)}USDT"), number)
    clock.now += WAIT_S
    batches = []
    while served := waiting.serve(set()):
        batches.append(served)
    assert [len(assets_of(each)) for each in batches] == [1] * LANES * 2


def test_a_batch_has_no_more_bytes_than_it_may() -> None:
    waiting, clock = lanes()
    sizes = [BATCH_BYTES_MAX // 3] * 4 + [BATCH_BYTES_MAX * 2]
    for number, size in enumerate(sizes):
        waiting.put(message("BTCUSDT", size=size), number)
    waiting.put(message("ETHUSDT"), 5)
    clock.now += WAIT_S
    tags = []
    while served := waiting.serve(set()):
        tags.append(served.tags)
        size = sum(len(each.body) for each in served.messages)
        assert size <= BATCH_BYTES_MAX or len(served.tags) == 1
    assert sorted(tag for each in tags for tag in each) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("body", "asset"),
    [
        (b'{"asset":"BTCUSDT","side":"Buy"}', b"BTCUSDT"),
        (b'{"event_type": "position", "data": {"symbol" : "BTCUSDT", "size": "1"}}', b"BTCUSDT"),
        (b'{"data": [{"symbol": "BTCUSDT"}, {"symbol": "ETHUSDT"}]}', b"BTCUSDT"),
        (b'{"symbol": "BTCUSDT", "fee": {"asset": "USDT"}}', b"BTCUSDT"),
        (b"{}", b""),
    ],
)
def test_the_asset_is_told_from_the_text(body: bytes, asset: bytes) -> None:
    assert named_asset(body) == asset


@given(st.binary() | st.sampled_from([b'{"asset": null}', b'{"symbol"', b'{"symbol": "BTC']))
def test_a_text_of_any_kind_has_its_lane(body: bytes) -> None:
    waiting, clock = lanes()
    waiting.put(Delivery("queue", body, {}, {}, NOW), 1)
    clock.now += WAIT_S
    served = waiting.serve(set())
    assert served is not None
    assert served.tags == [1]
