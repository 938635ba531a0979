"""The workers' root with a task that takes as long as it is told to."""

import time

import structlog

from celery_app import app

log = structlog.get_logger(__name__)


@app.task(name="tests.hold")
def hold(seconds: float) -> None:
    log.info("held")
    time.sleep(seconds)


__all__ = ["app"]
