"""The REST API with an address whose answer is held back: a test knows which requests are in flight."""

from __future__ import annotations

import threading
from pathlib import Path
from uuid import uuid4

from flask import Flask

from positions import web
from positions.web.auth import public


def create_app(folder: str) -> Flask:
    """Return the application; `/held` leaves a file in ``folder``, and answers once there is `go`."""
    app = web.create_app()

    def held() -> str:
        (Path(folder) / uuid4().hex).touch()
        while not (Path(folder) / "go").exists():
            threading.Event().wait(0.02)
        return "held"

    app.add_url_rule("/held", view_func=public(held))
    return app
