"""Columns of a batch as array literals of PostgreSQL, one parameter each.

psycopg2 writes a list as `ARRAY[...]`, with every element adapted and quoted by itself, and the server parses
each as an expression of its own.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from typing import Any


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


def numbers(values: Iterable[Decimal | int | None]) -> str:
    """Return the literal of an array of numbers, every digit kept."""
    return "{" + ",".join(["NULL" if value is None else str(value) for value in values]) + "}"


def times(values: Iterable[datetime | None]) -> str:
    """Return the literal of an array of timezone-aware times."""
    return "{" + ",".join(["NULL" if value is None else value.isoformat() for value in values]) + "}"


_LITERALS: Mapping[str, Callable[[Iterable[Any]], str]] = {
    "bigint": numbers,
    "integer": numbers,
    "jsonb": texts,
    "numeric": numbers,
    "text": texts,
    "timestamptz": times,
    "uuid": texts,
}


def literals(kinds: Mapping[str, str], columns: Mapping[str, Iterable[Any]]) -> dict[str, str]:
    """Return the parameters for :func:`unnest`: a literal for each column."""
    return {name: _LITERALS[kind](columns[name]) for name, kind in kinds.items()}


def unnest(kinds: Mapping[str, str]) -> str:
    """Return SQL that makes rows of the columns named, each of its kind."""
    return f"unnest({', '.join(f'%({name})s::{kind}[]' for name, kind in kinds.items())})"
