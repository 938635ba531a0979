"""A TCP proxy that cuts connections midway, and can swallow the answer to a COMMIT."""

from __future__ import annotations

import socket
import threading
from contextlib import closing, suppress

from tests.services import Port

_COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"
_CHUNK = 65_536


class Proxy:
    """Passes bytes between a port of its own and the server's, until told otherwise."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._kept = Port()
        self.port = self._kept.number
        self._listener = socket.create_server(("127.0.0.1", self.port), reuse_port=False, backlog=64)
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._swallow = 0
        self.swallowed = 0
        """Answers to a COMMIT that the client never saw."""
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow_commits(self, number: int) -> None:
        """Let the next ``number`` COMMITs reach the server, and their answers reach nobody."""
        with self._lock:
            self._swallow = number

    def cut(self) -> int:
        """Reset all connections; return how many there were."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._close(pair)
        return len(pairs)

    def close(self) -> None:
        # Wakes the thread that waits in accept().
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._kept.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            pair = (client, server)
            with self._lock:
                self._pairs.add(pair)
            swallowing = threading.Event()
            for source, sink in (pair, (server, client)):
                arguments = (source, sink, pair, swallowing)
                threading.Thread(target=self._pass, args=arguments, daemon=True).start()

    def _pass(
        self,
        source: socket.socket,
        sink: socket.socket,
        pair: tuple[socket.socket, socket.socket],
        swallowing: threading.Event,
    ) -> None:
        from_client = source is pair[0]
        try:
            while data := source.recv(_CHUNK):
                if from_client and data.endswith(_COMMIT) and self._swallows():
                    swallowing.set()
                elif not from_client and swallowing.is_set():
                    # The server has committed and says so.
                    with self._lock:
                        self.swallowed += 1
                    return
                sink.sendall(data)
        except OSError:
            pass
        finally:
            self._close(pair)

    def _swallows(self) -> bool:
        with self._lock:
            if self._swallow:
                self._swallow -= 1
                return True
        return False

    def _close(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            self._pairs.discard(pair)
        for each in pair:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            with closing(each):
                pass
