"""Exact decimal arithmetic: one context for sums and products, one place that rounds.

Money, sizes and prices are :class:`~decimal.Decimal`, never ``float``. What comes from the wire has at
most 20 integer digits and 18 decimals; a product of two such numbers has at most 36 decimals, which is
the scale the fold keeps (`FOLD_SCALE`). Nothing is rounded on the way but the quotients of a reduction,
and a figure is rounded half-even to 18 decimals (`SCALE`) once, when it leaves the fold.
"""

from contextlib import AbstractContextManager
from decimal import (
    ROUND_HALF_EVEN,
    Context,
    Decimal,
    DivisionByZero,
    Inexact,
    InvalidOperation,
    Overflow,
    localcontext,
)

ZERO = Decimal(0)
INTEGER_DIGITS = 20
SCALE = 18
FOLD_SCALE = 36

_UNIT = Decimal(1).scaleb(-SCALE)
_FOLD_UNIT = Decimal(1).scaleb(-FOLD_SCALE)
# A cost has 20 + 20 integer digits, 36 decimals, and some more for the sum of many; times a quantity it
# has 38 more: 160 leaves room. Inexact is trapped, so a sum or product that would round is an error.
_EXACT = Context(
    prec=160, rounding=ROUND_HALF_EVEN, traps=[Inexact, InvalidOperation, DivisionByZero, Overflow]
)
_ROUNDING = Context(prec=320, rounding=ROUND_HALF_EVEN, traps=[InvalidOperation, DivisionByZero, Overflow])
_FITTING = Context(prec=INTEGER_DIGITS + SCALE, traps=[Inexact, InvalidOperation])


def exact() -> AbstractContextManager[Context]:
    """Make sums and products in this block exact: what would round raises :class:`decimal.Inexact`."""
    return localcontext(_EXACT)


def proportion(amount: Decimal, part: Decimal, whole: Decimal) -> Decimal:
    """Return ``amount * part / whole``, rounded half-even to `FOLD_SCALE` decimals."""
    return _ROUNDING.quantize(_ROUNDING.divide(_ROUNDING.multiply(amount, part), whole), _FOLD_UNIT)


def quotient(amount: Decimal, by: Decimal) -> Decimal:
    """Return ``amount / by``, rounded half-even to `SCALE` decimals."""
    return _ROUNDING.quantize(_ROUNDING.divide(amount, by), _UNIT)


def rounded(amount: Decimal) -> Decimal:
    """Return ``amount`` rounded half-even to `SCALE` decimals: the form every figure is stored in."""
    return _ROUNDING.quantize(amount, _UNIT)


def fits(number: Decimal) -> bool:
    """Tell whether ``number`` is finite, below 1e20 and has no digit after the 18th decimal."""
    try:
        return _FITTING.quantize(number, _UNIT).is_finite()
    except (InvalidOperation, Inexact):  # more digits than fit, or such as would be rounded away
        return False


def without_padding(number: Decimal) -> Decimal:
    """Return a number that `fits` without padding zeros, in whatever context; 0 for any zero."""
    return _FITTING.normalize(number) if number else ZERO


def in_units_of(exponent: int, number: Decimal) -> int:
    """Return a number that `fits` as so many of 10 to the ``exponent``, cut off, in whatever context."""
    return int(_EXACT.scaleb(number, -exponent))


def plain(number: Decimal) -> str:
    """Return ``number`` as digits without exponent or padding zeros (``"0.5"``, never ``"5E-1"``)."""
    text = str(number)
    if "E" in text:
        text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
