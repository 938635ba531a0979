"""What a request may ask for: every parameter is known, checked, and named when it is wrong."""

import base64
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, TypeVar

from flask import request
from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError
from werkzeug.datastructures import MultiDict

from positions.domain.events import PositionKey
from positions.domain.numbers import fits
from positions.errors import PositionsError
from positions.queries.positions import PAGE_MAX

_ASSET = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{1,39}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_NUMBER_MAX_CHARS = 80


class BadParameters(PositionsError):
    """Parameters that mean nothing here.

    Args:
        faults: name of the parameter to what is wrong with it.
    """

    def __init__(self, faults: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {fault}" for name, fault in faults.items()))
        self.faults = faults


def _asset(text: str) -> str:
    # Checked before it is raised: the upper case of some letters beyond ASCII is in ASCII.
    if not _ASSET.fullmatch(text):
        raise ValueError("must be a symbol of 2 to 40 letters, digits and hyphens, like BTCUSDT")
    return text.upper()


def _number(text: str) -> Decimal:
    if len(text) <= _NUMBER_MAX_CHARS and _NUMBER.fullmatch(text) and fits(number := Decimal(text)):
        return number
    raise ValueError("must be a decimal number with at most 20 integer digits and 18 decimals")


def _limit(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text) or not 1 <= int(text) <= PAGE_MAX:
        raise ValueError(f"must be a whole number from 1 to {PAGE_MAX}")
    return int(text)


def _cursor(text: str) -> PositionKey:
    try:
        padded = text.encode() + b"=" * (-len(text) % 4)
        asset, mode = base64.b64decode(padded, altchars=b"-_", validate=True).decode().split(" ")
        return PositionKey.of(_asset(asset), mode)
    except ValueError:
        raise ValueError("must be the next_cursor of an earlier answer") from None


def cursor_of(key: PositionKey) -> str:
    """Return the cursor of the page that begins behind ``key``; what is in it is nobody's business."""
    # Without the padding, which a query string would have to escape.
    return base64.urlsafe_b64encode(" ".join(key).encode()).decode().rstrip("=")


Asset = Annotated[str, PlainValidator(_asset)]
Number = Annotated[Decimal, PlainValidator(_number)]
Limit = Annotated[int, PlainValidator(_limit)]
Cursor = Annotated[PositionKey, PlainValidator(_cursor)]


class Parameters(BaseModel):
    """Base of the parameters of a route; what it does not name is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=Parameters)


def parameters(model: type[Model]) -> Model:
    """Return the query and path parameters of the present request.

    Raises:
        BadParameters: names each that is unknown, wrong, or given twice.
    """
    return parse(model, request.args, request.view_args or {})


def parse(model: type[Model], query: MultiDict[str, str], path: Mapping[str, Any]) -> Model:
    """Return the parameters in ``query`` and ``path``; raises as `parameters` does."""
    given = MultiDict([*query.items(multi=True), *path.items()])
    faults = {name: "is given more than once" for name in given if len(given.getlist(name)) > 1}
    try:
        found = model.model_validate(given.to_dict())
    except ValidationError as error:
        faults = {**{str(each["loc"][0]): _fault(each) for each in error.errors()}, **faults}
    if faults:
        raise BadParameters(faults)
    return found


def _fault(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "is not a parameter of this address"
    own = error.get("ctx", {}).get("error")
    return str(own or error["msg"].replace("Input should", "must"))
