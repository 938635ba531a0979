"""Errors as problem documents (RFC 9457), and what each error of ours means for HTTP."""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

import structlog
from flask import Flask, Response, current_app, g, request
from werkzeug.exceptions import HTTPException

from positions.errors import ConcurrencyConflict, InvalidEvent, NotFound, PositionsError, Unavailable
from positions.web.parameters import BadParameters

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Meaning:
    """What an error means to a client."""

    status: int
    code: str
    detail: str | None = None
    """None: the error's own text, which is written for the client."""
    retry_after_s: int | None = None


MEANINGS: Mapping[type[PositionsError], Meaning] = {
    BadParameters: Meaning(status=400, code="bad_parameters"),
    NotFound: Meaning(status=404, code="not_found"),
    InvalidEvent: Meaning(status=409, code="still_refused"),
    ConcurrencyConflict: Meaning(
        status=409,
        code="conflict",
        detail="Others kept changing the position; the same request may succeed now.",
        retry_after_s=1,
    ),
    Unavailable: Meaning(
        status=503,
        code="unavailable",
        detail="The database cannot be reached now; the same request may succeed later.",
        retry_after_s=5,
    ),
}
_UNFORESEEN = Meaning(
    status=500, code="internal_error", detail="This is our fault. The trace id leads to it in our logs."
)


def init(app: Flask) -> None:
    """Make every error of ``app`` a problem document."""
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(PositionsError, _ours)
    app.register_error_handler(Exception, _unforeseen)


def _http(error: HTTPException) -> Response:
    response = problem(
        error.code or 500,
        code=error.name.lower().replace(" ", "_"),
        title=error.name,
        detail=error.description or error.name,
    )
    # Allow of a 405, WWW-Authenticate of a 401, ...
    response.headers.extend(each for each in error.get_headers() if each[0] != "Content-Type")
    return response


def _ours(error: PositionsError) -> Response:
    meaning = next((MEANINGS[each] for each in type(error).__mro__ if each in MEANINGS), None)
    if meaning is None:
        return _unforeseen(error)
    if meaning.status >= 500:
        log.warning("request_refused", reason=str(error), error_code=meaning.code)
    return _problem(meaning, error)


def _unforeseen(error: Exception) -> Response:
    log.error("request_failed", exc_info=error)
    return _problem(_UNFORESEEN, error)


def _problem(meaning: Meaning, error: Exception) -> Response:
    response = problem(
        meaning.status,
        code=meaning.code,
        title=HTTPStatus(meaning.status).phrase,
        detail=meaning.detail or str(error),
        details=error.faults if isinstance(error, BadParameters) else {},
    )
    if meaning.retry_after_s is not None:
        response.headers["Retry-After"] = str(meaning.retry_after_s)
    return response


def problem(
    status: int, *, code: str, title: str, detail: str, details: Mapping[str, str] | None = None
) -> Response:
    """Return a problem document; the last four members are those the older clients read."""
    body = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        "instance": request.path,
        "error_code": code,
        "message": detail,
        "trace_id": g.trace_id,
        "details": details or {},
    }
    return Response(current_app.json.dumps(body), status, content_type="application/problem+json")
