"""The REST API: `create_app` is its root."""

from flask import Flask, Response, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import LengthRequired, RequestEntityTooLarge

from positions import log_config
from positions.settings import Settings, load
from positions.web import (
    auth,
    health,
    limits,
    metrics,
    openapi,
    portfolio,
    positions,
    problems,
    quarantine,
    resources,
    shortcut,
    snapshots,
    tracing,
)
from positions.web.auth import public
from positions.web.parameters import BadParameters

# Nothing we take is longer. gunicorn bounds the request line and the headers before we see them.
BODY_MAX_BYTES = 64 * 1024
QUERY_MAX_BYTES = 2048

SAFE_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
)
# A page may say otherwise of itself.
UNLESS_SAID = (
    # Money and positions stay out of every cache on the way.
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
)


class _JSON(DefaultJSONProvider):
    # The order of the contract.
    sort_keys = False


def create_app(settings: Settings | None = None) -> Flask:
    """Return the web application; nothing is connected before the first request.

    Args:
        settings: of the caller, who has set up logging then; None reads the environment.

    Raises:
        SettingsError: a setting is wrong, or there is no API key.
    """
    if settings is None:
        settings = load()
        log_config.configure(settings)
    app = openapi.application()
    app.json = _JSON(app)
    app.config["MAX_CONTENT_LENGTH"] = BODY_MAX_BYTES
    # What is one address to a client is one address: no redirects between spellings.
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.extensions[resources.NAME] = resources.made_from(settings)
    problems.init(app)
    tracing.init(app)  # before what may refuse a request, so that the refusal is traced too
    app.before_request(_refuse_oversized)
    ring, limiter = auth.init(app, settings)
    app.after_request(_with_safe_headers)
    app.register_api(health.blueprint)
    app.register_api(metrics.blueprint)
    app.register_blueprint(openapi.pages)
    app.register_api(positions.blueprint)
    app.register_api(portfolio.blueprint)
    app.register_api(snapshots.blueprint)
    app.register_api(quarantine.blueprint)
    app.add_url_rule("/openapi.json", view_func=public(lambda: openapi.document(app)))
    headers = (*SAFE_HEADERS, *UNLESS_SAID)
    app.extensions[shortcut.NAME] = shortcut.ShortWay(app, settings, ring, limiter, headers)
    app.wsgi_app = limits.behind_proxies(app.wsgi_app, settings)  # type: ignore[method-assign,assignment]
    return app


def _refuse_oversized() -> None:
    if len(request.query_string) > QUERY_MAX_BYTES:
        raise BadParameters({"query": f"is longer than {QUERY_MAX_BYTES} bytes"})
    # Nobody who sends a few parameters sends them in chunks; their length would be known only at the end.
    if "Transfer-Encoding" in request.headers:
        raise LengthRequired
    # Flask looks at the length only once a view reads the body.
    if (request.content_length or 0) > BODY_MAX_BYTES:
        raise RequestEntityTooLarge


def _with_safe_headers(response: Response) -> Response:
    headers = response.headers
    headers.extend(SAFE_HEADERS)
    for name, value in UNLESS_SAID:
        headers.setdefault(name, value)
    return response
