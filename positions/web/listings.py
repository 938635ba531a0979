"""Lists as JSON, or as CSV where `Accept` prefers that, and the way to their next page."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any
from urllib.parse import urlencode

from flask import Response, jsonify, request

JSON, CSV = "application/json", "text/csv"
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
# What spreadsheets take for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def wants_csv() -> bool:
    """Tell whether the present request prefers CSV to JSON; who accepts neither gets JSON."""
    return _preference(CSV) > _preference(JSON)


def _preference(kind: str) -> tuple[float, int]:
    """Return the quality that `Accept` gives a media type, and how precisely it names it."""
    ranges = (kind, f"{kind.partition('/')[0]}/*", "*/*")
    # Parameters, such as a charset, are no reason to refuse.
    given = {text.partition(";")[0].strip().lower(): q for text, q in reversed(request.accept_mimetypes)}
    return next(((given[each], -place) for place, each in enumerate(ranges) if each in given), (0, 0))


def columns(view: type[Any]) -> list[str]:
    """Return the columns of a list of views: the members of their JSON."""
    return [field.name for field in fields(view)]


def listing(data: Mapping[str, Any], name: str, names: Sequence[str], *, link: str | None = None) -> Response:
    """Return ``data`` as JSON, or what it has under ``name`` as CSV.

    Args:
        data: JSON-ready.
        name: of the member that is the list.
        names: the columns of the CSV, which are members of the list's objects; what one lacks is empty.
        link: header that leads to the next page.
    """
    response = _csv(names, data[name]) if wants_csv() else jsonify(data)
    if link is not None:
        response.headers["Link"] = link
    # Another `Accept` may have another answer.
    response.vary.add("Accept")
    return response


def link_to(*, without: str = "", **parameters: str) -> str:
    """Return the `Link` from the present request to the one that has these parameters instead of its own."""
    kept = {name: value for name, value in request.args.items() if name != without}
    return f'<{request.script_root}{request.path}?{urlencode({**kept, **parameters})}>; rel="next"'


def _csv(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Response:
    """Return rows as RFC 4180 has it, in UTF-8, with one header line."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return Response(text.getvalue(), content_type=f"{CSV}; charset=utf-8; header=present")


def _cell(value: object) -> str:
    """Return a value as in JSON, without the quotes; null is empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return json.dumps(value)
    # Identifiers are others' texts, and must not run in a spreadsheet. A negative number is none.
    return f"'{value}" if value.startswith(_FORMULA) and not _NUMBER.fullmatch(value) else value
