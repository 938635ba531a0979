"""gunicorn's threaded worker, with what it lacks: our answers to broken requests, and an end to slow clients.

A client can hold a thread in three ways: by sending nothing, by sending slowly, and by not reading its
answer. The first is left to the poller, which costs nothing; the other two end after `HEAD_MAX_S` and
`REQUEST_MAX_S`. That bounds what one client costs, not what many do: as many slow clients as there are
threads still take them all, again and again. Only a proxy that reads whole requests and takes whole answers
before it bothers a thread (nginx does so by default) keeps those away.
"""

import logging
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import BytesIO
from typing import Any

import structlog
from gunicorn import util
from gunicorn.http import errors, wsgi
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

from positions.web.tracing import REFUSED

log = structlog.get_logger(__name__)

FIRST_BYTE_S = 0.05
"""How long a thread waits for a new connection's first byte; then the poller does."""
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
    """What gunicorn_conf names as the worker's class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ends: dict[Any, float] = {}
        """Connections that a thread is at work for, and until when it may be."""

    def init_process(self) -> None:
        logging.getLogger("gunicorn.error").addFilter(_without_traceback_of_a_lost_client)
        super().init_process()

    def handle(self, conn: Any) -> Any:
        """Serve one request; called in a thread."""
        # gunicorn has the thread wait five seconds: a handful of connections without a word would do.
        if not conn.initialized and not conn.data_ready and not conn.wait_for_data(FIRST_BYTE_S):
            return gthread._DEFER  # noqa: SLF001
        self._ends[conn] = time.monotonic() + HEAD_MAX_S
        try:
            again = super().handle(conn)
            if not again:
                # Here, not in the main loop, which would wait up to two seconds for the client to hang up.
                conn.close(graceful=True)
            return again
        finally:
            del self._ends[conn]

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
                # The thread's read or write ends; it closes the socket itself.
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
