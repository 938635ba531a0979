"""Acknowledging many deliveries with one frame, without ever touching one that is open."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from positions.tasks.intake import Settlement


class Channel:
    """A channel that refuses what RabbitMQ answers with a 406, and acknowledges what is below a tag."""

    def __init__(self, tags: range) -> None:
        self.open = set(tags)
        self.acknowledged: set[int] = set()
        self.frames = 0

    def basic_ack(self, tag: int, multiple: bool = False) -> None:
        assert tag in self.open, "406: unknown delivery tag"
        settled = {each for each in self.open if each <= tag} if multiple else {tag}
        self.frames += 1
        self.open -= settled
        self.acknowledged |= settled

    def basic_reject(self, tag: int, requeue: bool) -> None:
        assert requeue
        assert tag in self.open, "406: unknown delivery tag"
        self.open.remove(tag)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.data())
def test_only_settled_deliveries_are_acknowledged(sizes: list[int], data: st.DataObject) -> None:
    batches, first = [], 1
    for size in sizes:
        batches.append(range(first, first + size))
        first += size
    channel = Channel(range(1, first))
    settlement = Settlement(channel, multiple=True)
    for tag in range(1, first):
        settlement.opened(tag)
    done: set[int] = set()
    given_back: set[int] = set()
    left = data.draw(st.integers(0, len(batches)))
    for batch in data.draw(st.permutations(batches))[left:]:
        if data.draw(st.booleans()):
            settlement.acknowledge(batch)
            done |= set(batch)
        else:
            settlement.give_back(batch)
            given_back |= set(batch)
        assert channel.acknowledged <= done
    settlement.finish()
    assert channel.acknowledged == done
    assert channel.open == set(range(1, first)) - done - given_back


def test_batches_in_order_take_one_frame_each() -> None:
    channel = Channel(range(1, 401))
    settlement = Settlement(channel, multiple=True)
    for tag in range(1, 401):
        settlement.opened(tag)
    settlement.acknowledge(range(1, 201))
    settlement.acknowledge(range(201, 401))
    assert channel.frames == 2


def test_where_each_delivery_has_a_frame_of_its_own_none_is_remembered() -> None:
    channel = Channel(range(1, 101))
    settlement = Settlement(channel, multiple=False)
    for tag in range(1, 101):
        settlement.opened(tag)
    settlement.acknowledge(range(1, 51))
    settlement.give_back(range(51, 101))
    assert (channel.frames, channel.open) == (50, set())
    assert not settlement._open
    assert not settlement._settled
