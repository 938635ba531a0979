"""Columns of a batch as array literals of PostgreSQL, one parameter each.

psycopg2 writes a list as `ARRAY[...]`, with every element adapted and quoted by itself, and the server parses
each as an expression of its own.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from typing import Any

from positions.domain.times import utc_text

_BETWEEN_DOCUMENTS = "\x1e"


def texts(values: Iterable[str | None]) -> str:
    """Return the literal of an array of text, or of anything that is given as text."""
    values = list(values)
    with suppress(TypeError):  # None is among them
        plain = '","'.join(values)  # type: ignore[arg-type]
        # Where there are no quotes but those between them, none has to be escaped.
        if values and "\\" not in plain and plain.count('"') == 2 * (len(values) - 1):
            return '{"' + plain + '"}'
    quoted = [
        "NULL" if value is None else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        for value in values
    ]
    return "{" + ",".join(quoted) + "}"


def documents(values: Iterable[str]) -> str:
    """Return JSON documents as one text: none has a control character, as JSON writes those as escapes.

    Their many quotes, which an array's literal would escape and the server take back, stay as they are.
    """
    return _BETWEEN_DOCUMENTS.join(values)


def numbers(values: Iterable[Decimal | int | None]) -> str:
    """Return the literal of an array of numbers, every digit kept."""
    return "{" + ",".join(["NULL" if value is None else str(value) for value in values]) + "}"


def times(values: Iterable[datetime | None]) -> str:
    """Return the literal of an array of timezone-aware times."""
    return "{" + ",".join(["NULL" if value is None else utc_text(value) for value in values]) + "}"


_LITERALS: Mapping[str, Callable[[Iterable[Any]], str]] = {
    "bigint": numbers,
    "integer": numbers,
    "json": documents,
    "jsonb": documents,
    "numeric": numbers,
    "text": texts,
    "timestamptz": times,
    "uuid": texts,
}


def literals(kinds: Mapping[str, str], columns: Mapping[str, Iterable[Any]]) -> dict[str, str]:
    """Return the parameters for :func:`unnest`: a literal for each column."""
    return {name: _LITERALS[kind](columns[name]) for name, kind in kinds.items()}


def unnest(kinds: Mapping[str, str]) -> str:
    """Return SQL that makes rows of the columns named, each of its kind; `json` is text, not parsed."""
    return f"unnest({', '.join(_given(name, kind) for name, kind in kinds.items())})"


def _given(name: str, kind: str) -> str:
    if _LITERALS[kind] is not documents:
        return f"%({name})s::{kind}[]"
    texts_ = f"string_to_array(%({name})s, E'\\x1e')"
    return texts_ if kind == "json" else f"{texts_}::{kind}[]"
