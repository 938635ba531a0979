"""Who may ask: the key in ``X-API-Key``, for everything that is not marked `public`."""

import hashlib
import hmac
from collections.abc import Callable
from typing import TypeVar

from flask import Flask, current_app, g, request
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Unauthorized

from positions.settings import PREFIX, Settings, SettingsError

View = TypeVar("View", bound=Callable[..., object])


def public(view: View) -> View:
    """Mark a view that asks for no key."""
    view.public = True  # type: ignore[attr-defined]
    return view


def needs_operate(view: View) -> View:
    """Mark a view that only a key of the role `operate` may call; all that change something are, unmarked."""
    view.needs_operate = True  # type: ignore[attr-defined]
    return view


def init(app: Flask, settings: Settings) -> None:
    """Let only requests with the key pass, whether or not there is anything at their address.

    Raises:
        SettingsError: no key is set.
    """
    expected = _digest(required_key(settings))
    realm = settings.service_name

    def check() -> None:
        view = current_app.view_functions.get(request.endpoint or "")
        if getattr(view, "public", False):
            return
        given = request.headers.get("X-API-Key")
        # Digests, so that neither the time nor the length compared tells anything of the key. WSGI
        # hands over the header's bytes as Latin-1.
        if given is None or not hmac.compare_digest(_digest(given.encode("latin-1")), expected):
            raise Unauthorized(
                "The header X-API-Key is missing." if given is None else "The API key is not known here.",
                www_authenticate=WWWAuthenticate("ApiKey", {"realm": realm}),
            )
        g.key_name = "default"

    app.before_request(check)


def required_key(settings: Settings) -> bytes:
    """Return the one API key.

    Raises:
        SettingsError: there is none.
    """
    if settings.api_key is None:
        raise SettingsError(f"{PREFIX}API_KEY: required, the key that clients send as X-API-Key")
    return settings.api_key.get_secret_value().encode()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
