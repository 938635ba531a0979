"""Reading AMQP frames in bulk.

py-amqp asks the kernel three times for each frame, and sets the socket's timeout before and after: for a
message that is nine reads, at twice the price of everything else that a worker's main process does with it.
Here one read takes what has arrived, and all whole frames in it are dealt with before the next. What the
intake consumes is read off its frames without becoming a message of py-amqp first.
"""

import struct
from collections.abc import Callable, Container
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from amqp.exceptions import UnexpectedFrame
from amqp.transport import TCPTransport

READ_BYTES = 262_144
_HEADER = struct.Struct(">BHI")  # type, channel, size of the payload
_END = 0xCE
_METHOD, _CONTENT, _BODY = 1, 2, 3  # types of frames
_DELIVER = b"\x00\x3c\x00\x3c"  # class and method of basic.deliver
_TAG = struct.Struct(">QB")  # delivery tag, and whether it was delivered before
_BODY_SIZE = struct.Struct(">Q")
# In a content header, behind its class and weight.
_BODY_SIZE_AT, _PROPERTIES_AT = 4, 12


class Delivered(NamedTuple):
    """A message as it is in its frames."""

    consumer: bytes
    """Its consumer's tag."""
    tag: int
    again: bool
    """Whether it was delivered before."""
    properties: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class Deliveries:
    """Which deliveries are not py-amqp's to deal with."""

    channel: Any
    """The `amqp.Channel` they come on."""
    consumers: Container[bytes]
    """The tags of the consumers, of which the channel may have others."""
    take: Callable[[Delivered, datetime], None]
    """Is given each, with the moment from which on it was here."""


class Frames:
    """The frames of one connection, cut out of what its socket has sent."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._bytes: bytes = transport._read_buffer  # noqa: SLF001 - what was read and not used yet
        self._at = 0

    def whole(self) -> tuple[int, int, bytes] | None:
        """Return the next frame (type, channel, payload) if all of it is here."""
        held, begin = self._bytes, self._at
        if len(held) - begin < _HEADER.size:
            return None
        kind, channel, size = _HEADER.unpack_from(held, begin)
        begin += _HEADER.size
        end = begin + size
        if len(held) <= end:
            return None
        if held[end] != _END:
            raise UnexpectedFrame(f"Received frame_end {held[end]:#04x} while expecting 0xce")
        self._at = end + 1
        return kind, channel, held[begin:end]

    def delivery(self, of: Deliveries) -> Delivered | None:
        """Return the next message, if all of it is here and it is one ``of`` those.

        Nearly all have three frames: a method, a content header, and one for the body. Any other is left to
        py-amqp, frame by frame.
        """
        held, number, head = self._bytes, of.channel.channel_id, _HEADER.size
        method = self._at + head
        if held[method : method + len(_DELIVER)] != _DELIVER:
            return None
        try:
            kind, channel, size = _HEADER.unpack_from(held, self._at)
            content = method + size + 1 + head
            content_kind, content_channel, content_size = _HEADER.unpack_from(held, content - head)
            body = content + content_size + 1 + head
            body_kind, body_channel, body_size = _HEADER.unpack_from(held, body - head)
            end = body + body_size
            if (
                (kind, content_kind, body_kind) != (_METHOD, _CONTENT, _BODY)
                or (channel, content_channel, body_channel) != (number, number, number)
                or (held[method + size], held[content + content_size], held[end]) != (_END, _END, _END)
                or _BODY_SIZE.unpack_from(held, content + _BODY_SIZE_AT) != (body_size,)
            ):
                return None
        except (struct.error, IndexError):
            return None  # the rest of it is still to come
        tag = method + len(_DELIVER) + 1
        tag_end = tag + held[tag - 1]
        consumer = held[tag:tag_end]
        if consumer not in of.consumers:
            return None
        self._at = end + 1
        delivery_tag, flags = _TAG.unpack_from(held, tag_end)
        properties = held[content + _PROPERTIES_AT : content + content_size]
        return Delivered(consumer, delivery_tag, bool(flags & 1), properties, held[body:end])

    def read(self) -> tuple[int, int, bytes]:
        """Return the next frame, as `amqp.transport.read_frame` does: waits as long as the socket does.

        Raises:
            TimeoutError: it did not come in time; what came of it is kept.
            OSError: the connection is lost.
        """
        while (frame := self.whole()) is None:
            try:
                more = self._transport.sock.recv(READ_BYTES)
                if not more:
                    raise ConnectionResetError("Server unexpectedly closed connection")
            except (TimeoutError, BlockingIOError, InterruptedError):
                raise
            except OSError:
                self._transport.connected = False
                raise
            self._bytes, self._at = self._bytes[self._at :] + more, 0
        return frame


def read_in_bulk(connection: Any, deliveries: Deliveries | None = None) -> None:
    """Let an open `amqp.Connection` read its frames in bulk; one with TLS stays as it is."""
    transport = connection.transport
    if not isinstance(transport, TCPTransport):
        return
    frames = Frames(transport)
    drain_one = connection.drain_events

    def taken(now: datetime) -> bool:
        if deliveries is None or deliveries.channel.is_closing:
            return False
        if (delivered := frames.delivery(deliveries)) is None:
            return False
        connection.bytes_recv += 1  # as py-amqp counts frames: what came is as good as a heartbeat
        deliveries.take(delivered, now)
        return True

    def drain_events(timeout: float | None = None) -> None:
        told = False
        now = datetime.now(UTC)
        # A frame may close the connection, or have a callback wait for others.
        while connection.connected:
            if taken(now):
                told = True
            elif (frame := frames.whole()) is not None:
                told = bool(connection.on_inbound_frame(frame)) or told
            else:
                break
        if not told:
            drain_one(timeout)

    transport.read_frame = frames.read
    connection.drain_events = drain_events
