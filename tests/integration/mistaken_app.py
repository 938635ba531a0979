"""The application for gunicorn, with a bug that shows as the worker's main loop takes up a request."""

from __future__ import annotations

from flask import Flask

from positions.web import create_app as create
from positions.web import shortcut
from positions.web.shortcut import ShortWay


class _Mistaken(ShortWay):
    def keeps(self, target: str) -> bool:
        if "mistaken" in target:
            raise RuntimeError("a fault of ours")
        return super().keeps(target)


def create_app() -> Flask:
    app = create()
    app.extensions[shortcut.NAME].__class__ = _Mistaken
    return app
