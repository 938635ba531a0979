"""Reading AMQP frames in bulk.

py-amqp asks the kernel three times for each frame, and sets the socket's timeout before and after: for a
message that is nine reads, at twice the price of everything else that a worker's main process does with it.
Here one read takes what has arrived, and all whole frames in it are dealt with before the next.
"""

import struct
from typing import Any

from amqp.exceptions import UnexpectedFrame
from amqp.transport import TCPTransport

READ_BYTES = 262_144
_HEADER = struct.Struct(">BHI")  # type, channel, size of the payload
_END = 0xCE


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


def read_in_bulk(connection: Any) -> None:
    """Let an open `amqp.Connection` read its frames in bulk; one with TLS stays as it is."""
    transport = connection.transport
    if not isinstance(transport, TCPTransport):
        return
    frames = Frames(transport)
    drain_one = connection.drain_events

    def drain_events(timeout: float | None = None) -> None:
        told = False
        # A frame may close the connection, or have a callback wait for others.
        while connection.connected and (frame := frames.whole()) is not None:
            told = bool(connection.on_inbound_frame(frame)) or told
        if not told:
            drain_one(timeout)

    transport.read_frame = frames.read
    connection.drain_events = drain_events
