"""Frames read in bulk are those that py-amqp reads one by one, however the network cuts them."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from amqp.exceptions import UnexpectedFrame
from amqp.transport import TCPTransport
from hypothesis import given
from hypothesis import strategies as st

from positions.tasks.frames import Delivered, Deliveries, Frames, read_in_bulk

Frame = tuple[int, int, bytes]


def wire(frame: Frame) -> bytes:
    kind, channel, payload = frame
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


class Pieces:
    """A socket without a wait: what it has not got yet is a timeout."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def recv(self, _size: int) -> bytes:
        if not self.pieces:
            raise TimeoutError
        return self.pieces.pop(0)


def transport(pieces: list[bytes], *, read_before: bytes = b"") -> Any:
    made = TCPTransport("localhost")
    made._read_buffer = read_before
    made.sock = Pieces(pieces)
    made.connected = True
    return made


frames_ = st.lists(st.tuples(st.sampled_from([1, 2, 3, 8]), st.integers(0, 65_535), st.binary(max_size=50)))


@given(frames_, st.data())
def test_frames_arrive_whole_and_in_order_however_they_are_cut(
    frames: list[Frame], data: st.DataObject
) -> None:
    stream = b"".join(map(wire, frames))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    pieces = [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    reader = Frames(transport([each for each in pieces[1:] if each], read_before=pieces[0]))
    assert [reader.read() for _ in frames] == frames
    with pytest.raises(TimeoutError):
        reader.read()


def test_what_came_of_a_frame_before_a_timeout_is_kept() -> None:
    frame = (1, 7, b"payload")
    link = transport([wire(frame)[:9]])
    reader = Frames(link)
    with pytest.raises(TimeoutError):
        reader.read()
    assert link.connected
    link.sock.pieces.append(wire(frame)[9:])
    assert reader.read() == frame


def test_a_closed_connection_is_known_to_be_one() -> None:
    link = transport([b""])
    with pytest.raises(ConnectionResetError):
        Frames(link).read()
    assert not link.connected


def test_a_frame_that_does_not_end_as_one_is_refused() -> None:
    with pytest.raises(UnexpectedFrame):
        Frames(transport([wire((1, 1, b"x"))[:-1] + b"\0"])).read()


class Channel:
    """What `Deliveries` needs of an `amqp.Channel`."""

    channel_id = 5
    is_closing = False


def message(
    body: bytes, *, channel: int = 5, consumer: bytes = b"ours", size: int | None = None
) -> list[Frame]:
    """Return the frames in which the broker delivers a message: delivered before, its tag 77, persistent."""
    method = b"\0\x3c\0\x3c" + bytes([len(consumer)]) + consumer + struct.pack(">QB", 77, 1) + b"\0\x05queue"
    content = struct.pack(">HHQHB", 60, 0, len(body) if size is None else size, 0x1000, 2)
    return [(1, channel, method), (2, channel, content), (3, channel, body)]


messages = st.one_of(
    st.binary(max_size=50).map(message),
    st.builds(message, st.binary(max_size=50), channel=st.integers(1, 9)),
    st.builds(message, st.binary(max_size=50), consumer=st.sampled_from([b"", b"another"])),
    # Several frames for a body, or none; other methods, and heartbeats.
    st.binary(min_size=2, max_size=50).map(
        lambda body: [*message(body[:1], size=len(body)), (3, 5, body[1:])],
    ),
    st.just(message(b"")[:2]),
    st.builds(lambda kind, payload: [(kind, 5, payload)], st.sampled_from([1, 8]), st.binary(max_size=20)),
)


@given(st.lists(messages), st.data())
def test_messages_of_ours_are_read_off_their_frames_and_all_others_left(
    sent: list[list[Frame]], data: st.DataObject
) -> None:
    stream = b"".join(wire(frame) for frames in sent for frame in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    pieces = [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    made = connection(transport([each for each in pieces[1:] if each], read_before=pieces[0]))
    taken: list[Delivered] = []
    order: list[Any] = []

    def take(delivered: Delivered, _: datetime) -> None:
        taken.append(delivered)
        order.append(message(delivered.body))

    def on_inbound_frame(frame: Frame) -> bool:
        order.append([frame])
        return True

    made.on_inbound_frame = on_inbound_frame
    read_in_bulk(made, Deliveries(Channel(), {b"ours"}, take))
    with suppress(TimeoutError):
        while True:
            made.drain_events()
    assert [frame for frames in order for frame in frames] == [frame for frames in sent for frame in frames]
    assert {each[:4] for each in taken} <= {(b"ours", 77, True, b"\x10\0\x02")}
    # Of what was here in one piece none is left to py-amqp.
    if pieces[0] == stream:
        ours = [frames for frames in sent if frames == message(frames[-1][2])]
        assert len(taken) == len(ours)


def test_nothing_is_taken_of_a_channel_that_is_being_closed() -> None:
    made = connection(transport([], read_before=b"".join(map(wire, message(b"body")))))
    channel = Channel()
    channel.is_closing = True
    read_in_bulk(made, Deliveries(channel, {b"ours"}, lambda *_: pytest.fail("taken")))
    with suppress(TimeoutError):
        made.drain_events()
    assert made.seen == message(b"body")


def connection(link: Any) -> Any:
    """Return what `read_in_bulk` needs of an `amqp.Connection`: frames of type 1 are whole messages."""
    seen: list[Frame] = []

    def on_inbound_frame(frame: Frame) -> bool:
        seen.append(frame)
        return frame[0] == 1

    def drain_events(_timeout: float | None = None) -> None:
        while not made.on_inbound_frame(link.read_frame()):
            pass

    made = SimpleNamespace(
        transport=link,
        connected=True,
        seen=seen,
        bytes_recv=0,
        on_inbound_frame=on_inbound_frame,
        drain_events=drain_events,
    )
    return made


def test_one_turn_deals_with_all_that_has_arrived_and_waits_for_nothing() -> None:
    frames = [(1, 1, b"a"), (1, 1, b"b"), (1, 1, b"c")]
    made = connection(transport([b"".join(map(wire, frames))]))
    read_in_bulk(made)
    made.drain_events()
    made.drain_events()
    assert made.seen == frames
    with pytest.raises(TimeoutError):
        made.drain_events()


def test_a_frame_that_is_no_message_is_not_the_end_of_waiting_for_one() -> None:
    made = connection(transport([wire((2, 1, b"half")), wire((1, 1, b"whole"))]))
    read_in_bulk(made)
    made.drain_events()
    assert made.seen == [(2, 1, b"half"), (1, 1, b"whole")]


def test_a_callback_that_waits_for_an_answer_gets_the_frames_behind_its_own() -> None:
    frames = [(1, 1, b"delivered"), (1, 1, b"answer"), (1, 1, b"more")]
    made = connection(transport([b"".join(map(wire, frames))]))
    told = made.on_inbound_frame

    def on_inbound_frame(frame: Frame) -> bool:
        result: bool = told(frame)
        if frame[2] == b"delivered":
            made.drain_events()
        return result

    made.on_inbound_frame = on_inbound_frame
    read_in_bulk(made)
    made.drain_events()
    assert made.seen == frames


def test_nothing_is_read_of_a_connection_that_a_frame_has_closed() -> None:
    made = connection(transport([wire((1, 0, b"close")) + wire((1, 1, b"after"))]))
    told = made.on_inbound_frame

    def on_inbound_frame(frame: Frame) -> bool:
        made.connected = frame[2] != b"close"
        return bool(told(frame))

    made.on_inbound_frame = on_inbound_frame
    read_in_bulk(made)
    made.drain_events()
    assert made.seen == [(1, 0, b"close")]


def test_a_connection_with_tls_is_left_as_it_is() -> None:
    made = SimpleNamespace(transport=SimpleNamespace(sock=socket.socket()), drain_events=None)
    read_in_bulk(made)
    assert made.drain_events is None
    made.transport.sock.close()
