"""What the API takes and gives, as OpenAPI 3.1 at `/openapi.json`, and a page at `/docs` to read and try it.

Paths, parameters and answers come from the views; what holds for many of them, errors and headers, is
added here.
"""

from importlib import resources
from typing import Any

from flask import Blueprint, Response, abort
from flask_openapi3 import APIBlueprint, Info, OpenAPI, Tag
from pydantic import BaseModel, ConfigDict

from positions import __version__
from positions.web.auth import public

_KEY = "key"
_DESCRIPTION = """\
What do we hold, and what is it worth?

Sizes, prices and money are plain strings, exact to the last digit; times are ISO 8601 UTC ending in `Z`.
`X-Trace-Id` (or a W3C `traceparent`) is taken over where it is well-formed, made otherwise, and returned.

Another method than those below is answered with 405 and `Allow`, another address with 404, both as problem
documents. `Retry-After` and `RateLimit-*` come where they mean something."""

_CSV = (
    "As RFC 4180 has it, with a header line; numbers and times as in JSON, null is empty. Text that a"
    " spreadsheet would take for a formula has an apostrophe before it. `ETag` comes with JSON only."
)


class Problem(BaseModel):
    """What went wrong (RFC 9457); the last four members are those that older clients read."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str
    title: str
    status: int
    detail: str
    instance: str
    """The path that was asked for."""
    error_code: str
    """For programs: it does not change."""
    message: str
    """The detail."""
    trace_id: str
    """Leads to the request in our logs."""
    details: dict[str, str]
    """What is wrong with each parameter."""


# Status -> what it means, and which headers come with it.
_PROBLEMS = {
    400: ("Parameters that are unknown, wrong or given twice, each named in `details`.", ()),
    401: ("No key, a wrong one, or one that has expired.", ("WWW-Authenticate",)),
    403: ("The key's role does not allow it.", ()),
    404: ("There is none.", ()),
    409: (
        "Others kept changing the position under every try; or the message is refused again.",
        ("Retry-After",),
    ),
    411: ("The body comes in chunks.", ()),
    413: ("The body is too large.", ()),
    415: ("The body does not say that it is JSON.", ()),
    429: ("Too many requests of this key, or too many wrong keys from this address.", ("Retry-After",)),
    500: ("Our fault; the trace id leads to it in our logs.", ()),
    503: ("The database cannot be reached now.", ("Retry-After",)),
}
_LIMIT_HEADERS = ("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")
_HEADERS = {
    "X-Trace-Id": ("string", "Of this request: given with it, or made."),
    "ETag": (
        "string",
        "Of the answer; sent back as `If-None-Match`, it gives 304 while the answer is the same.",
    ),
    "Link": (
        "string",
        "With `rel=next`, the address of the next page, as a reference to be resolved; none on the last.",
    ),
    "Vary": ("string", "`Accept`: JSON, or CSV where that is preferred."),
    "Retry-After": ("integer", "Seconds after which to try again."),
    "WWW-Authenticate": ("string", "Where the key belongs."),
    "RateLimit-Limit": ("integer", "Requests a minute that this key may make."),
    "RateLimit-Remaining": ("integer", "How many of them are left now."),
    "RateLimit-Reset": ("integer", "Seconds until the first of those that count no longer does."),
}
TAGGED = {"x-tagged": True}
"""Of a view whose answers carry an `ETag`."""
LISTED = {"x-listed": True}
"""Of a view whose answer is a list that may be had as CSV."""
OF_BODY = {"x-of-body": True}
"""Of a view whose parameters may also be the members of a JSON body."""
PROBLEM = {
    "description": "Why not.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
}
"""An answer of a view of its own that is a problem document."""


def api(name: str, prefix: str = "/api/v1") -> APIBlueprint:
    """Return a blueprint whose views are documented, and ask for a key."""
    return APIBlueprint(
        name,
        __name__,
        url_prefix=prefix or None,
        abp_tags=[Tag(name=name)],
        abp_security=[{_KEY: []}] if prefix else None,
        operation_id_callback=lambda *, bp_name, name, **_: f"{bp_name}_{name}",
    )


def application() -> OpenAPI:
    """Return the Flask application that gathers what its views say of themselves."""
    return OpenAPI(
        "positions",
        info=Info(title="positions", version=__version__, description=_DESCRIPTION),
        security_schemes={_KEY: {"type": "apiKey", "in": "header", "name": "X-API-Key"}},
        validation_error_status=400,
        validation_error_model=Problem,
        doc_ui=False,
        static_folder=None,
    )


def document(app: OpenAPI) -> dict[str, Any]:
    """Return the API's description, whole."""
    made = app.api_doc
    components = made["components"]
    if "responses" in components:
        return made
    components["headers"] = {
        name: {"schema": {"type": kind}, "description": text} for name, (kind, text) in _HEADERS.items()
    }
    components["responses"] = {
        f"Problem{status}": {
            "description": text,
            "headers": _headers("X-Trace-Id", *headers, *_LIMIT_HEADERS),
            "content": PROBLEM["content"],
        }
        for status, (text, headers) in _PROBLEMS.items()
    }
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            _complete(operation, method, path)
    return made


def _complete(operation: dict[str, Any], method: str, path: str) -> None:
    """Add the errors and headers that an operation has in common with others."""
    # Of the docstring, what is for callers of the address.
    told = operation.pop("description", "").replace("<br/>", "\n").partition("\nRaises:")[0].strip()
    if told:
        operation["description"] = told
    for parameter in operation.get("parameters", ()):
        if parameter["schema"].get("default", "") is None:
            del parameter["schema"]["default"]
    if operation.pop("x-of-body", False):
        members = {
            each["name"]: _in_json(each["schema"])
            for each in operation["parameters"]
            if each["in"] == "query"
        }
        operation["requestBody"] = {
            "description": "The parameters of the query may stand here instead, and count before those.",
            "content": {
                "application/json": {
                    "schema": {"type": "object", "properties": members, "additionalProperties": False}
                }
            },
        }
    answers = operation["responses"]
    limited = bool(operation.get("security"))
    # The library's own 400 is of another shape.
    answers.pop("400", None)
    expected = {500}
    if limited:
        expected |= {400, 401, 403, 429, 503}
    if operation.pop("x-text", False):
        answers["200"]["content"]["text/plain"] = {"schema": {"type": "string"}}
    listed = operation.pop("x-listed", False)
    if listed:
        answers["200"]["content"]["text/csv"] = {"schema": {"type": "string", "description": _CSV}}
    if method == "post":
        expected |= {409, 411, 413, 415}
    if "{" in path:
        expected.add(404)
    for status, answer in answers.items():
        tagged = operation.get("x-tagged") and status == "200"
        names = ("X-Trace-Id", *(_LIMIT_HEADERS if limited else ()), *(("ETag",) if tagged else ()))
        if listed:
            names += ("Link", "Vary")
        answer["headers"] = _headers(*names)
    if operation.pop("x-tagged", False):
        answers["304"] = {
            "description": "The same as the answer with this `ETag`.",
            "headers": _headers("X-Trace-Id", "ETag", *_LIMIT_HEADERS),
        }
        operation.setdefault("parameters", []).append(
            {"name": "If-None-Match", "in": "header", "schema": {"type": "string"}, "required": False}
        )
    for status in sorted(expected):
        answers.setdefault(str(status), {"$ref": f"#/components/responses/Problem{status}"})


def _in_json(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a parameter as a member of a body, where a flag may be a flag."""
    return {"anyOf": [{"type": "boolean"}, schema]} if "true" in schema.get("enum", ()) else schema


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


pages = Blueprint("docs", __name__)

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>positions: API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger-ui.css">
<div id="page"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
"""
_START = """\
SwaggerUIBundle({url: "/openapi.json", dom_id: "#page", deepLinking: true, validatorUrl: null});
"""
_ASSETS = {
    "swagger-ui.css": ("css/swagger-ui.css", "text/css"),
    "swagger-ui-bundle.js": ("js/swagger-ui-bundle.js", "text/javascript"),
}
# Swagger UI sets styles on elements, and has its icons in the stylesheet.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@pages.get("/docs")
@public
def page() -> Response:
    """Return the page; what it loads is ours too."""
    return Response(_PAGE, mimetype="text/html", headers={"Content-Security-Policy": _POLICY})


@pages.get("/docs/<name>")
@public
def asset(name: str) -> Response:
    """Return what the page loads."""
    lasting = {"Cache-Control": "public, max-age=86400"}
    if name == "start.js":
        return Response(_START, mimetype="text/javascript", headers=lasting)
    if name not in _ASSETS:
        abort(404)
    where, kind = _ASSETS[name]
    file = resources.files("flask_openapi3_swagger") / "templates" / "swagger" / where
    return Response(file.read_bytes(), mimetype=kind, headers=lasting)
