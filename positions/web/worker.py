"""gunicorn's threaded worker, with what it lacks: our answers to broken requests, and an end to slow clients.

A client can hold a thread in two ways: by sending slowly, and by not reading its answer. These end after
`HEAD_MAX_S` and `REQUEST_MAX_S`; one that sends nothing has no thread yet. That bounds what one client costs,
not what many do: as many slow clients as there are threads still take them all, again and again. Only a proxy
that reads whole requests and takes whole answers before it bothers a thread (nginx does so by default) keeps
those away.
"""

import errno
import logging
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from io import BytesIO
from typing import Any

import structlog
from gunicorn import util
from gunicorn.http import errors, wsgi
from gunicorn.http.parser import RequestParser
from gunicorn.workers import gthread
from werkzeug.exceptions import (
    BadRequest,
    ExpectationFailed,
    HTTPException,
    InternalServerError,
    NotImplemented,  # noqa: A004 - HTTP's 501
    RequestHeaderFieldsTooLarge,
    RequestURITooLarge,
)

from positions.web import shortcut
from positions.web.shortcut import Asked, ShortWay
from positions.web.tracing import REFUSED

log = structlog.get_logger(__name__)

HEAD_MAX_BYTES = 8192
"""What the main loop reads at once."""
HEAD_MAX_S = 4.0
"""How long a request's line and headers may take from the first byte on; they come in one packet mostly."""
REQUEST_MAX_S = 20.0
"""How long the rest may take, to the last byte of the answer, or the connection is cut."""

# The first that fits; what is in the error's own text is the client's, and stays out.
_MEANINGS: tuple[tuple[type[Exception], type[HTTPException], str], ...] = (
    (errors.InvalidResponseHeader, InternalServerError, "This is our fault."),
    (errors.InvalidResponseHeaderName, InternalServerError, "This is our fault."),
    (errors.LimitRequestLine, RequestURITooLarge, "The request line is too long."),
    (
        errors.LimitRequestHeaders,
        RequestHeaderFieldsTooLarge,
        "The headers are too many or too long.",
    ),
    (errors.UnsupportedTransferCoding, NotImplemented, "The transfer coding is not known here."),
    (errors.ExpectationFailed, ExpectationFailed, "What Expect asks for cannot be met."),
    (errors.ParseException, BadRequest, "The request is not HTTP as we understand it."),
)


class Worker(gthread.ThreadWorker):  # type: ignore[misc] # gunicorn has no types
    """What gunicorn_conf names as the worker's class.

    The main loop reads what clients send, and answers itself what takes the short way
    (`positions.web.shortcut`): all that came meanwhile together, and without waking a thread. All else, and
    what comes in parts, is for the pool of threads, as in gthread.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ends: dict[Any, float] = {}
        """Connections whose request is being served, and until when it may be."""
        self._short_way: ShortWay | None = None
        """None where the application has none."""
        self._together: list[tuple[Any, Asked]] = []
        self._found_out: dict[Any, dict[str, object]] = {}
        """By socket, what the short way found out about a request that goes on the long way."""

    def init_process(self) -> None:
        logging.getLogger("gunicorn.error").addFilter(_without_traceback_of_a_lost_client)
        super().init_process()

    def load_wsgi(self) -> None:
        app = self.app.wsgi()
        self._short_way = getattr(app, "extensions", {}).get(shortcut.NAME)

        def with_what_was_found_out(environ: Any, start_response: Any) -> Any:
            environ.update(self._found_out.pop(environ.get("gunicorn.socket"), ()))
            return app(environ, start_response)

        self.wsgi = with_what_was_found_out

    def accept(self, listener: Any) -> None:
        """Take a connection, and wait for its first request as for any other; called in the main loop."""
        try:
            client, address = listener.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                raise
            return
        self.nr_conns += 1
        conn = gthread.TConn(self.cfg, client, address, listener.getsockname())
        conn.head = None
        self._wait_for_request(conn)
        self.poller.register(client, selectors.EVENT_READ, partial(self.on_client_socket_readable, conn))

    def _wait_for_request(self, conn: Any) -> None:
        conn.set_timeout()
        if not self.alive:
            # It took its last answer slowly; a worker that stops does not wait for another request as long.
            conn.timeout = time.monotonic() + gthread.STOP_KEEPALIVE_LINGER
        self.keepalived_conns.append(conn)

    def on_client_socket_readable(self, conn: Any, client: Any) -> None:
        """Take up a request; called in the main loop."""
        self.keepalived_conns.remove(conn)
        try:
            conn.read = client.recv(HEAD_MAX_BYTES)
        except OSError:
            conn.read = b""
        if not conn.read:
            self._close(conn)
        elif asked := self._begun(conn):
            self._together.append((conn, asked))
        else:
            self._long_way(conn)

    def _begun(self, conn: Any) -> Asked | None:
        """Return what ``conn`` sent as a request that may take the short way, None for others."""
        if (
            self._short_way is None
            or not self.alive
            # The last one, or one too many: gthread ends the worker, or the connection.
            or self.nr + len(self._together) + 1 >= self.max_requests
            or len(self.keepalived_conns) >= self.max_keepalived
            or not conn.read.startswith(b"GET ")
            # One request, all of it.
            or conn.read.find(b"\r\n\r\n") != len(conn.read) - 4
        ):
            return None
        try:
            # Who asks again says the same again, byte for byte: reading it costs more than all the rest.
            if conn.read != conn.head:
                conn.head = None
                if not self._short_way.keeps(conn.read.split(b" ", 2)[1].decode("latin-1")):
                    return None
                request = next(RequestParser(self.cfg, (conn.read,), conn.client))
                if request.version != (1, 1) or request.should_close() or request._expected_100_continue:  # noqa: SLF001
                    return None
                _, conn.environ = wsgi.create(request, conn.sock, conn.client, conn.server, self.cfg)
                conn.head = conn.read
            return self._short_way.begin(conn.environ)
        except (errors.ParseException, StopIteration):
            return None
        except Exception as error:  # noqa: BLE001 - the main loop must go on
            self._found_out[conn.sock] = {REFUSED: error}
            return None

    def _long_way(self, conn: Any) -> None:
        self.poller.unregister(conn.sock)
        self.enqueue_req(conn)

    def _close(self, conn: Any) -> None:
        self.poller.unregister(conn.sock)
        self.nr_conns -= 1
        conn.close()

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """Take up what there is; called again and again in the main loop."""
        super().wait_for_and_dispatch_events(timeout)
        if self._short_way and self._together:
            together, self._together = self._together, []
            self._answer(self._short_way, together)

    def _answer(self, short_way: ShortWay, together: Sequence[tuple[Any, Asked]]) -> None:
        short_way.ask([asked for _, asked in together])
        common = f"Server: {wsgi.SERVER}\r\nDate: {util.http_date()}\r\nConnection: keep-alive\r\n"
        for conn, asked in together:
            answer = short_way.answer(asked)
            if answer is None:
                self._found_out[conn.sock] = asked.found_out
                self._long_way(conn)
                continue
            self.nr += 1
            status, headers, body = answer
            own = "".join([f"{name}: {value}\r\n" for name, value in headers])
            self._send(conn, f"HTTP/1.1 {status}\r\n{common}{own}\r\n".encode("latin-1"), body)

    def _send(self, conn: Any, head: bytes, body: bytes) -> None:
        try:
            sent = conn.sock.sendmsg((head, body))
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close(conn)
            return
        if sent == len(head) + len(body):
            self._wait_for_request(conn)
            return
        self._ends[conn] = time.monotonic() + REQUEST_MAX_S
        rest = memoryview(head + body)[sent:]
        self.poller.modify(conn.sock, selectors.EVENT_WRITE, partial(self._send_rest, conn, rest))

    def _send_rest(self, conn: Any, rest: memoryview, client: Any) -> None:
        try:
            rest = rest[client.send(rest) :]
        except BlockingIOError:
            return
        except OSError:
            del self._ends[conn]
            self._close(conn)
            return
        if rest:
            self.poller.modify(client, selectors.EVENT_WRITE, partial(self._send_rest, conn, rest))
        else:
            del self._ends[conn]
            self._wait_for_request(conn)
            self.poller.modify(client, selectors.EVENT_READ, partial(self.on_client_socket_readable, conn))

    def handle(self, conn: Any) -> Any:
        """Serve one request; called in a thread."""
        self._ends[conn] = time.monotonic() + HEAD_MAX_S
        try:
            conn.init()
            conn.parser.unreader.unread(conn.read)
            conn.read = b""
            again = super().handle(conn)
            if not again:
                # Here, not in the main loop, which would wait up to two seconds for the client to hang up.
                conn.close(graceful=True)
            return again
        finally:
            del self._ends[conn]
            self._found_out.pop(conn.sock, None)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer a request whose head is read; called in a thread."""
        self._ends[conn] = time.monotonic() + REQUEST_MAX_S
        return super().handle_request(req, conn)

    def finish_request(self, conn: Any, fs: Any) -> None:
        """Take a connection back from a thread; called in the main loop."""
        if fs.cancelled() or fs.exception() or fs.result():
            super().finish_request(conn, fs)
        else:
            self.nr_conns -= 1

    def _keepalive_after(self, conn: Any, keepalive: Any) -> Any:
        try:
            return super()._keepalive_after(conn, keepalive)
        except errors.ParseException:
            # The rest of the body is broken, but the request has had its answer.
            return False

    def murder_pending(self) -> None:
        """Cut off who is too slow; called in the main loop, at least once a second."""
        super().murder_pending()
        now = time.monotonic()
        for conn, end in list(self._ends.items()):
            if now > end:
                # The read or write ends; who does it closes the socket.
                with suppress(OSError):
                    conn.sock.shutdown(socket.SHUT_RDWR)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer what never reached the application as the application would."""
        del req  # of a request that could not be read there is none
        status, detail = next(
            ((status, detail) for kind, status, detail in _MEANINGS if isinstance(exc, kind)),
            (InternalServerError, "This is our fault."),
        )
        if status is InternalServerError:
            log.error("request_failed", exc_info=exc)
        environ = {
            "REQUEST_METHOD": "UNKNOWN",
            "PATH_INFO": "/",
            "QUERY_STRING": "",
            "SERVER_NAME": "",
            "SERVER_PORT": "",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": addr[0] if addr else "",
            "wsgi.url_scheme": "http",
            "wsgi.input": BytesIO(),
            "wsgi.errors": wsgi.WSGIErrorsWrapper(self.cfg),
            REFUSED: status(detail),
        }
        head: list[str] = []

        def start_response(status_line: str, headers: Iterable[tuple[str, str]], _: Any = None) -> None:
            head.append(f"HTTP/1.1 {status_line}")
            head.extend(f"{name}: {value}" for name, value in headers)

        answer = self.wsgi(environ, start_response)
        body = b"".join(answer)
        close: Callable[[], None] | None = getattr(answer, "close", None)
        if close:
            close()
        head += [f"Server: {wsgi.SERVER}", f"Date: {util.http_date()}", "Connection: close", "", ""]
        try:
            util.write_nonblock(client, "\r\n".join(head).encode("latin-1") + body)
        except OSError:
            log.debug("client_gone")


def _without_traceback_of_a_lost_client(record: logging.LogRecord) -> bool:
    """Let a connection that breaks under gunicorn be a line, not a traceback: it is no fault of ours."""
    if record.exc_info and isinstance(record.exc_info[1], OSError):
        record.msg, record.args = f"{record.getMessage()} {record.exc_info[1]}", ()
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True
