"""What a request may ask for: every parameter is known, checked, and named when it is wrong."""

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from functools import wraps
from typing import Annotated, Any, TypeVar, get_type_hints

from flask import request
from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError, WithJsonSchema
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import BadRequest

from positions.domain.events import Mode, PositionKey
from positions.domain.numbers import fits
from positions.errors import PositionsError
from positions.queries.positions import PAGE_MAX
from positions.settings import moment

_ASSET = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{1,39}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_NUMBER_MAX_CHARS = 80
# As people write them, and as libraries write Python's own.
_FLAGS = {"true": True, "false": False, "True": True, "False": False, "1": True, "0": False}


class BadParameters(PositionsError):
    """Parameters that mean nothing here.

    Args:
        faults: name of the parameter to what is wrong with it.
    """

    def __init__(self, faults: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {fault}" for name, fault in faults.items()))
        self.faults = faults


def text(read: Callable[[str], Any]) -> PlainValidator:
    """Return a validator that reads a value from text: a JSON body may hold anything."""

    def check(value: object) -> Any:
        if not isinstance(value, str):
            raise ValueError("must be text")
        return read(value)

    return PlainValidator(check)


def _asset(text: str) -> str:
    # Checked before it is raised: the upper case of some letters beyond ASCII is in ASCII.
    if not _ASSET.fullmatch(text):
        raise ValueError("must be a symbol of 2 to 40 letters, digits and hyphens, like BTCUSDT")
    return text.upper()


def _number(text: str) -> Decimal:
    if len(text) <= _NUMBER_MAX_CHARS and _NUMBER.fullmatch(text) and fits(number := Decimal(text)):
        return number
    raise ValueError("must be a decimal number with at most 20 integer digits and 18 decimals")


def between(least: int, most: int) -> tuple[PlainValidator, WithJsonSchema]:
    """Return how a whole number from ``least`` to ``most`` is read and described."""

    def parse(given: str) -> int:
        if not re.fullmatch(r"[0-9]{1,20}", given) or not least <= int(given) <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return int(given)

    return text(parse), WithJsonSchema({"type": "integer", "minimum": least, "maximum": most})


def _flag(text: str) -> bool:
    if text not in _FLAGS:
        raise ValueError("must be true or false")
    return _FLAGS[text]


def _moment(text: str) -> datetime:
    # A plus that nobody escaped is a space by now.
    return moment(text.replace(" ", "+") if "T" in text else text)


def cursor(pattern: str, read: Callable[..., Any]) -> tuple[PlainValidator, WithJsonSchema]:
    """Return how a cursor is read and described: ``read`` is called with the groups of ``pattern``."""
    whole = re.compile(pattern)

    def parse(given: str) -> Any:
        found = whole.fullmatch(given)
        if found is None:
            raise ValueError("must be the next_cursor of an earlier answer")
        return read(*found.groups())

    description = "The `next_cursor` of an earlier answer."
    return text(parse), WithJsonSchema(
        {"type": "string", "pattern": f"^{pattern}$", "description": description}
    )


def cursor_of(*values: object) -> str:
    """Return the cursor of the page that begins behind ``values``."""
    return ".".join(map(str, values))


KeyCursor = Annotated[PositionKey, *cursor(r"([A-Z0-9][A-Z0-9-]{1,39})\.(one-way|hedge)", PositionKey.of)]
Asset = Annotated[
    str,
    text(_asset),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": f"^{_ASSET.pattern}$",
            "description": "In any case.",
            "example": "BTCUSDT",
        }
    ),
]
Number = Annotated[
    Decimal,
    text(_number),
    # Other spellings are read too, such as those of Python's Decimal.
    WithJsonSchema({"type": "string", "pattern": r"^-?[0-9]{1,20}(\.[0-9]{1,18})?$"}),
]
Limit = Annotated[int, *between(1, PAGE_MAX)]
Flag = Annotated[bool, text(_flag), WithJsonSchema({"type": "string", "enum": list(_FLAGS)})]
Moment = Annotated[
    datetime,
    text(_moment),
    WithJsonSchema(
        {"type": "string", "format": "date-time", "description": "ISO 8601; without a zone it is UTC."}
    ),
]


class Parameters(BaseModel):
    """Base of the parameters of a route; what it does not name is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class OfAsset(Parameters):
    """The part of an address that names an asset."""

    asset: Asset


class OfMode(Parameters):
    """Which of an asset's positions."""

    mode: Mode = Mode.ONE_WAY


View = TypeVar("View", bound=Callable[..., Any])


def checked(view: View) -> View:
    """Give a view its `path` and `query`, of the types it names for them.

    All that is wrong with a request is said at once: each parameter that is unknown, wrong, or given twice.

    Raises:
        BadParameters: when the view is called.
    """
    hints = get_type_hints(view, include_extras=True)
    models = {name: hints[name] for name in ("path", "query") if name in hints}
    models.setdefault("query", Parameters)

    @wraps(view)
    def wrapper(**path: Any) -> Any:
        # What the body names counts before what the query does; both must be right.
        sources = (("path", MultiDict(path)), ("query", request.args), ("query", _body()))
        found: dict[str, Any] = {}
        faults = {}
        for name, given in sources:
            if given is None or name not in models:
                continue
            read, wrong = parsed(models[name], given)
            faults.update(wrong)
            if read is not None and found.get(name) is not None:
                named = {each: getattr(read, each) for each in read.model_fields_set}
                read = found[name].model_copy(update=named)
            found[name] = read
        if faults:
            raise BadParameters(faults)
        return view(**{name: model for name, model in found.items() if name in hints})

    # flask-openapi3 would derive a JSON schema at every request; this says that the view's own decorator
    # looks at the request.
    wrapper.__delay_validate_request__ = True  # type: ignore[attr-defined]
    return wrapper  # type: ignore[return-value]


def _body() -> MultiDict[str, Any] | None:
    """Return the members of a JSON object in the body, where there is a body.

    Raises:
        BadParameters: it is no JSON object.
        UnsupportedMediaType: it does not say that it is JSON.
    """
    if request.method in {"GET", "HEAD"} or not request.content_length:
        return None
    try:
        members = request.get_json()
    except (BadRequest, RecursionError):
        members = None
    if not isinstance(members, dict):
        raise BadParameters({"body": "must be a JSON object"})
    # true is "true" in a query.
    return MultiDict(
        {name: str(value) if isinstance(value, bool) else value for name, value in members.items()}
    )


def parsed(model: type[Parameters], given: MultiDict[str, Any]) -> tuple[Parameters | None, dict[str, str]]:
    """Return the parameters that are ``given``, and by name what is wrong with them."""
    twice = {name: "is given more than once" for name in given if len(given.getlist(name)) > 1}
    try:
        return model.model_validate(given.to_dict()), twice
    except ValidationError as error:
        faults: dict[str, str] = {}
        for each in error.errors():
            # Of what may be left out, the first fault is that of its own type.
            faults.setdefault(str(each["loc"][0]) if each["loc"] else "body", _fault(each))
        return None, {**faults, **twice}


def _fault(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "is not a parameter of this address"
    own = error.get("ctx", {}).get("error")
    return str(own or error["msg"].replace("Input should", "must"))
