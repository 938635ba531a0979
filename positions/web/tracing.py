"""The trace id of a request, and the one line that is logged of it."""

import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

import structlog
from flask import Flask, Response, g, request

from positions.web import metrics

log = structlog.get_logger(__name__)

BEGAN = "positions.began"
"""Key of the WSGI environment: when a request began, by `time.perf_counter`, where that was seen earlier."""
REFUSED = "positions.refused"
"""Key of the WSGI environment: the error to answer with, of a request that failed before Flask saw it."""

_TRACE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
# W3C Trace Context: later versions may add to the end, ff is no version, ids of zeros only are no ids.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?"
)


def init(app: Flask) -> None:
    """Give every request of ``app`` a trace id and a line in the log."""
    app.before_request(_begin)
    app.after_request(_end)
    app.teardown_request(_forget)


def trace_id_of(environ: Mapping[str, Any]) -> str:
    """Return the trace id in the headers of a request, where well-formed, or a new one."""
    given: str = environ.get("HTTP_X_TRACE_ID", "")
    if _TRACE_ID.fullmatch(given):
        return given
    parent = _TRACEPARENT.fullmatch(environ.get("HTTP_TRACEPARENT", ""))
    return parent[1] if parent else secrets.token_hex(16)


def _begin() -> None:
    g.began_at = request.environ.get(BEGAN) or time.perf_counter()
    g.trace_id = trace_id_of(request.environ)
    structlog.contextvars.bind_contextvars(trace_id=g.trace_id)
    if refused := request.environ.get(REFUSED):
        raise refused


def _end(response: Response) -> Response:
    response.headers["X-Trace-Id"] = g.trace_id
    # The pattern: a path may be anything a client makes up.
    route = request.url_rule.rule if request.url_rule else None
    served(
        method=request.method,
        route=route,
        status=response.status_code,
        began_at=g.began_at,
        key_name=g.get("key_name"),
        client=request.remote_addr,
        trace_id=g.trace_id,
    )
    return response


def served(*, method: str, route: str | None, status: int, began_at: float, **fields: str | None) -> None:
    """Count and log a request that is answered."""
    seconds = time.perf_counter() - began_at
    metrics.request_served(method, route, status, seconds)
    log.log(
        30 if status >= 500 else 20,
        "request_served",
        method=method,
        route=route,
        status=status,
        duration_ms=round(seconds * 1000, 3),
        **fields,
    )


def _forget(_error: BaseException | None) -> None:
    # A thread serves many requests, and logs between them.
    structlog.contextvars.clear_contextvars()
