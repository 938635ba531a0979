"""The REST API with less patience for slow clients and databases, so that tests need not have as much."""

from __future__ import annotations

import time
from typing import Any

import psycopg2
import structlog
from flask import Flask

from positions import web
from positions.storage import database
from positions.web import worker

log = structlog.get_logger(__name__)


def create_app(
    *,
    request_max_s: float = worker.REQUEST_MAX_S,
    answer_s: float = database.ANSWER_S,
    probe_s: float = database.PROBE_S,
) -> Flask:
    """Return the application; called in each worker."""
    worker.REQUEST_MAX_S, database.ANSWER_S, database.PROBE_S = request_max_s, answer_s, probe_s
    wait_until = database._wait_until

    def told(connection: Any, deadline: float) -> None:
        limit_s = deadline - time.monotonic()
        try:
            wait_until(connection, deadline)
        except psycopg2.OperationalError:
            log.info("waited_in_vain", limit_s=limit_s)
            raise

    database._wait_until = told
    return web.create_app()
