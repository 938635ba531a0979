"""The REST API with an address whose answer is held back: a test knows which requests are in flight."""

from __future__ import annotations

import threading
from pathlib import Path
from uuid import uuid4

from flask import Flask

from positions import web
from positions.web import memory, worker
from positions.web.auth import public


def create_app(
    folder: str, *, kept_s: float = memory.KEPT_S, request_max_s: float = worker.REQUEST_MAX_S
) -> Flask:
    """Return the application; `/held` leaves a file in ``folder``, and answers once there is `go`."""
    memory.KEPT_S, worker.REQUEST_MAX_S = kept_s, request_max_s
    app = web.create_app()

    def held() -> str:
        (Path(folder) / uuid4().hex).touch()
        while not (Path(folder) / "go").exists():
            threading.Event().wait(0.02)
        return "held"

    app.add_url_rule("/held", view_func=public(held))
    return app
