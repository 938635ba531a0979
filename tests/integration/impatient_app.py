"""The REST API with less patience for slow clients, so that tests need not have as much."""

from flask import Flask

from positions import web
from positions.web import worker


def create_app() -> Flask:
    """Return the application; called in each worker."""
    worker.REQUEST_MAX_S = 1.0
    return web.create_app()
