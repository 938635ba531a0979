"""One format for everything that is logged: by the application, by Celery and by gunicorn.

An event has a static name, and its identifiers as fields. What belongs to the task or request at work
(``trace_id``, ``task_id``, ...) is bound once with :mod:`structlog.contextvars` and is on every line of
it, the libraries' too.
"""

import logging.config
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor, WrappedLogger

from positions.settings import Settings, unknown

REDACTED = "[redacted]"

# Their INFO tells of each message, connection or task, which the one line a task has says already.
_NOISY = (
    "amqp",
    "celery.beat",
    "celery.app.trace",
    "celery.worker.strategy",
    "kombu",
    "sqlalchemy",
    "urllib3",
    "werkzeug",
)

_NUMBERS = (bool, int, float)
_LISTS = (list, tuple, set, frozenset)

_SENSITIVE = r"(?:pass(?:word|wd|phrase)|secret|api[-_]?key|authorization|access[-_]?token|cookie)"
_SECRET_KEY = re.compile(_SENSITIVE, re.IGNORECASE)
_SECRET_PAIR = re.compile(
    rf"({_SENSITIVE}[\"']?\s*[=:]\s*[\"']?(?:(?:basic|bearer)\s+)?)[^\s\"'&,;)}}]+", re.IGNORECASE
)
# Up to the last @ before a path: a password may hold one.
_URL_CREDENTIALS = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s\"/]*@", re.IGNORECASE)


def configure(settings: Settings) -> None:
    """Set up structlog and the standard library's logging for this process; once more does no harm."""
    logging.config.dictConfig(dict_config(settings))
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[*_context(settings.service_name), *_rendering(settings)],
        logger_factory=_Lines,
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        cache_logger_on_first_use=True,
    )


def warn_of_unknown_settings() -> None:
    """Log each variable of our prefix that no setting reads: most likely a misspelt one."""
    for name, nearest in unknown(os.environ).items():
        structlog.get_logger(__name__).warning("setting_unknown", variable=name, did_you_mean=nearest)


class _Lines:
    """Writes our own events: they need no detour through :mod:`logging`, which would double their cost."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def msg(self, line: str) -> None:
        # Standard output is for what commands print. One write a line, so that lines do not mix.
        with suppress(OSError, ValueError):  # a full disk must not end what was to be logged
            sys.stderr.write(line + "\n")

    debug = info = warning = error = critical = msg


def dict_config(settings: Settings) -> dict[str, Any]:
    """Return the configuration of :mod:`logging`, for those who insist on applying it themselves."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "one": {
                "()": structlog.stdlib.ProcessorFormatter,
                "foreign_pre_chain": _context(settings.service_name),
                "processors": [
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    *_rendering(settings),
                ],
            }
        },
        "handlers": {
            "stderr": {"class": "logging.StreamHandler", "formatter": "one", "stream": "ext://sys.stderr"}
        },
        "root": {"handlers": ["stderr"], "level": settings.log_level},
        "loggers": {
            **{name: {"level": "WARNING"} for name in _NOISY},
            # gunicorn gives its loggers handlers of their own, which this takes away. Of a request the
            # application says more than gunicorn's access log, which a configuration turns on.
            "gunicorn.error": {"handlers": [], "propagate": True, "level": settings.log_level},
            "gunicorn.access": {"handlers": [], "propagate": False, "level": "CRITICAL"},
        },
    }


def _context(service: str) -> list[Processor]:
    """Return what is done to an event where it is logged, ours or a library's."""

    def add_service(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event["service"] = service
        return event

    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        add_service,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _rendering(settings: Settings) -> list[Processor]:
    """Return how an event becomes a line. Secrets go last: the text of an exception may quote a URL."""
    if settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty()):
        # Never the local variables: they hold whole messages, and keys.
        exceptions = structlog.processors.ExceptionRenderer(
            ExceptionDictTransformer(show_locals=False, max_frames=30)
        )
        return [exceptions, redact, structlog.processors.JSONRenderer()]
    lines = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    return [structlog.processors.format_exc_info, redact, lines]


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace secrets in an event: by the name of the field, and in text wherever one is recognised."""
    return {
        name: value if value is None or type(value) in _NUMBERS else _redacted(name, value)
        for name, value in event.items()
    }


def _redacted(name: str, value: object) -> object:
    # The classes are tuples, and text comes first: this runs for every field of every line.
    if value is None or isinstance(value, _NUMBERS):
        return value
    if _is_secret(name):
        return REDACTED
    if isinstance(value, str):
        text = value
    elif isinstance(value, Mapping):
        return {str(key): _redacted(str(key), each) for key, each in value.items()}
    elif isinstance(value, _LISTS):
        return [_redacted("", each) for each in value]
    else:
        text = str(value)
    # Most of what is logged can hold no secret, which is quickly seen.
    if "@" in text:
        text = _URL_CREDENTIALS.sub(rf"\g<1>{REDACTED}@", text)
    if "=" in text or ":" in text:
        text = _SECRET_PAIR.sub(rf"\g<1>{REDACTED}", text)
    return text


@lru_cache(1000)
def _is_secret(name: str) -> bool:
    return _SECRET_KEY.search(name) is not None
