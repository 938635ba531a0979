"""What we say of a position and of the portfolio: one shape for the published events and the REST answers.

A view holds the figures as they are; `object_of` turns it into JSON-ready data: decimals as plain
strings, times as ISO 8601 UTC ending in Z.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cache, cached_property
from hashlib import blake2b
from json.encoder import encode_basestring_ascii
from operator import add, attrgetter, sub
from types import NoneType
from typing import Annotated, Any, Self, cast

from pydantic import ConfigDict, WithJsonSchema

from positions.domain.events import PositionKey
from positions.domain.figures import (
    Figures,
    is_stale,
    minutes_held,
    position_exposure,
    size_norm,
    unrealized_pct,
)
from positions.domain.numbers import ZERO, exact, plain
from positions.domain.times import utc_text
from positions.domain.values import value_class

# What the documentation of the API is generated from: the types below, and the texts under the fields.
DOCUMENTED = ConfigDict(use_attribute_docstrings=True)
Amount = Annotated[
    Decimal,
    WithJsonSchema({"type": "string", "pattern": r"^(0|-?(0\.[0-9]*[1-9]|[1-9][0-9]*(\.[0-9]*[1-9])?))$"}),
]
"""A size, price or sum of money: in JSON a plain string, without exponent or padding zeros."""
Time = Annotated[datetime, WithJsonSchema({"type": "string", "format": "date-time", "pattern": "Z$"})]


@value_class(frozen=True, kw_only=True, slots=True)
class PositionView:
    """A position as its readers see it: what is stored, and what follows from it at a moment.

    The fields, in this order, are the contract's position object.
    """

    __pydantic_config__ = DOCUMENTED

    id: str
    asset: str
    """The traded symbol, upper case."""
    mode: str
    """`one-way` (one signed size) or `hedge` (a long leg and a short one)."""
    size: Amount
    """Signed, in the asset's own units; in hedge mode the sum of both legs."""
    average_entry_price: Amount | None
    """Null when flat, and in hedge mode while both legs are open."""
    current_price: Amount | None
    """The mark price; null while none is known."""
    current_price_at: Time | None
    current_price_source: str | None
    """`report` (the exchange's position message) or `price_api` (its tickers)."""
    price_is_stale: bool
    """Whether the price is older than the staleness threshold."""
    unrealized_pnl: Amount
    """In USDT; 0 when flat, and until a price is known."""
    realized_pnl: Amount
    """In USDT, net of fees and funding, since the first event."""
    long_size: Amount
    """0 or more."""
    short_size: Amount
    """0 or less."""
    long_avg_price: Amount | None
    short_avg_price: Amount | None
    unrealized_pnl_pct: Amount | None
    """Percent of the entry value; null only while neither an average nor a price is known."""
    time_held_minutes: int
    """Whole minutes since the present cycle opened; 0 when flat."""
    position_size_norm: Amount | None
    """Share of the portfolio's gross exposure, 0 to 1; null only while unpriced."""
    version: int
    """1 at creation, and one more with every change."""
    last_updated: Time
    last_snapshot_at: Time | None
    opened_at: Time | None
    """When the present cycle, from flat to flat, began; null when flat."""
    closed_at: Time | None
    """When it became flat; null while open."""
    created_at: Time

    @classmethod
    def of(
        cls,
        row: Mapping[Any, Any],
        *,
        portfolio_exposure: Decimal,
        now: datetime,
        stale_after: timedelta,
    ) -> Self:
        """Return the view of a row of `positions.storage.tables.positions`; other columns are ignored.

        Args:
            row: column name to value.
            portfolio_exposure: gross exposure of all priced positions, this one included, in USDT.
            now: the moment the view is taken.
            stale_after: age from which a price is stale.
        """
        stored = {name: row[name] for name in STORED}
        return cls(**stored, **_derived(stored, portfolio_exposure, now, stale_after))

    @classmethod
    def of_figures(
        cls,
        figures: Figures,
        *,
        id: str,  # noqa: A002 - the column's name
        key: PositionKey,
        version: int,
        last_updated: datetime,
        last_snapshot_at: datetime | None,
        created_at: datetime,
        portfolio_exposure: Decimal,
        now: datetime,
        stale_after: timedelta,
    ) -> Self:
        """Return the view of freshly computed figures, the same as of the row they are stored in."""
        shown = dict(zip(_FIGURES, _figures(figures), strict=True))
        return cls(
            **shown,
            **_derived(shown, portfolio_exposure, now, stale_after),
            id=id,
            asset=key.asset,
            mode=str(key.mode),
            version=version,
            last_updated=last_updated,
            last_snapshot_at=last_snapshot_at,
            created_at=created_at,
        )


def _derived(
    shown: Mapping[str, Any], portfolio_exposure: Decimal, now: datetime, stale_after: timedelta
) -> dict[str, Any]:
    """Return the fields of a position's view that follow from others at a moment."""
    size, price = shown["size"], shown["current_price"]
    with exact():
        gross = position_exposure(shown["long_size"] - shown["short_size"], price)
        net = None if gross is None else position_exposure(abs(size), price)
        return {
            "price_is_stale": price is not None and is_stale(shown["current_price_at"], now, stale_after),
            "unrealized_pnl_pct": unrealized_pct(
                shown["unrealized_pnl"], size, shown["average_entry_price"], gross
            ),
            "time_held_minutes": minutes_held(shown["opened_at"], now),
            "position_size_norm": size_norm(net, portfolio_exposure),
        }


_DERIVED = {"price_is_stale", "unrealized_pnl_pct", "time_held_minutes", "position_size_norm"}
_FIELDS = tuple(field.name for field in fields(PositionView))
_fields = attrgetter(*_FIELDS)
STORED = tuple(name for name in _FIELDS if name not in _DERIVED)
"""The columns that a view shows as they are."""


_FIGURES = tuple(field.name for field in fields(Figures) if field.name in STORED)
_figures = attrgetter(*_FIGURES)

_encode = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True)
class Json:
    """What is JSON already, as a member of something JSON-ready."""

    text: str

    @cached_property
    def digest(self) -> str:
        """A hash of it: the same may be a member of several answers."""
        return blake2b(self.text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class AssetView:
    """What all positions of one asset add up to; the names with a unit are the older service's."""

    __pydantic_config__ = DOCUMENTED

    exposure: Amount | None
    """Gross, in USDT, over the priced positions; null while all open ones are unpriced."""
    unrealized: Amount
    realized: Amount
    exposure_usdt: Amount | None
    unrealized_pnl_usdt: Amount
    realized_pnl_usdt: Amount
    size: Amount
    """Signed, in the asset's own units."""

    @cached_property
    def json(self) -> str:
        """The view as JSON: most assets' is the same in one portfolio after the other."""
        return _encode(object_of(self))


class ByAsset(dict[str, AssetView]):
    """What is shown of each asset, in order of the asset."""

    @property
    def json(self) -> Json:
        """All of it as JSON."""
        members = [f"{encode_basestring_ascii(name)}:{each.json}" for name, each in self.items()]
        return Json(f"{{{','.join(members)}}}")


REALIZED_PARTS = ("realized_gross", "fees_paid", "funding_received", "realized_adjustment")
_ADDED = ("exposure", "net_exposure", "unrealized_pnl", "realized_pnl", *REALIZED_PARTS)
_COUNTED = ("open_count", "long_count", "short_count", "ids")
_NO_AMOUNTS, _NO_COUNTS = (ZERO,) * len(_ADDED), (0,) * len(_COUNTED)


@dataclass(frozen=True, kw_only=True, slots=True)
class AssetSums:
    """An asset's part of the portfolio."""

    view: AssetView
    amounts: tuple[Decimal, ...]
    """Of the columns `_ADDED`."""
    counts: tuple[int, ...]
    """Of the columns `_COUNTED`."""
    unpriced: bool
    """Whether an open position has no price."""
    oldest_price_at: datetime | None
    """Of the open positions; None where none of them has a price."""

    @classmethod
    def of(cls, row: Mapping[Any, Any]) -> Self:
        """Return what is kept of a row of `positions.storage.portfolio.Sums`."""
        exposure, unrealized, realized = row["exposure"], row["unrealized_pnl"], row["realized_pnl"]
        return cls(
            view=AssetView(
                exposure=exposure,
                unrealized=unrealized,
                realized=realized,
                exposure_usdt=exposure,
                unrealized_pnl_usdt=unrealized,
                realized_pnl_usdt=realized,
                size=row["size"],
            ),
            # Zeros are one and the same: many are kept.
            amounts=tuple(row[name] or ZERO for name in _ADDED),
            counts=tuple(row[name] for name in _COUNTED),
            unpriced=row["unpriced"],
            oldest_price_at=row["oldest_price_at"],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PortfolioSums:
    """The parts of all assets, and what they add up to; as it is made, of none."""

    by_asset: Mapping[str, AssetSums] = field(default_factory=dict)
    """In order of the asset."""
    amounts: tuple[Decimal, ...] = _NO_AMOUNTS
    counts: tuple[int, ...] = _NO_COUNTS

    @property
    def ids(self) -> int:
        """What tells whether all positions are in it, and no others."""
        return self.counts[-1]

    def with_rows(self, rows: Iterable[Mapping[Any, Any]]) -> Self:
        """Return these sums with those of ``rows`` (`positions.storage.portfolio.Sums`) for their assets."""
        by_asset, amounts, counts = dict(self.by_asset), self.amounts, self.counts
        with exact():
            for row in rows:
                new, old = AssetSums.of(row), by_asset.get(row["asset"])
                if old:
                    amounts = tuple(map(sub, amounts, old.amounts))
                    counts = tuple(map(sub, counts, old.counts))
                amounts = tuple(map(add, amounts, new.amounts))
                counts = tuple(map(add, counts, new.counts))
                by_asset[row["asset"]] = new
        if len(by_asset) > len(self.by_asset):
            by_asset = {name: by_asset[name] for name in sorted(by_asset)}
        return replace(self, by_asset=by_asset, amounts=amounts, counts=counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class PortfolioView:
    """What all positions add up to; exposures over the priced ones only."""

    __pydantic_config__ = DOCUMENTED

    total_exposure_usdt: Amount
    """Gross: the sum of |size| x price; both legs of a hedged position count."""
    net_exposure_usdt: Amount
    """The sum of size x price."""
    portfolio_value_usdt: Amount
    """The net exposure, as the older service names it."""
    total_unrealized_pnl_usdt: Amount
    total_realized_pnl_usdt: Amount
    """Gross - fees + funding + adjustment, exactly."""
    total_pnl_usdt: Amount
    """Unrealized + realized."""
    total_realized_gross_usdt: Amount
    total_fees_usdt: Amount
    """Paid is positive."""
    total_funding_usdt: Amount
    """Received is positive."""
    total_realized_adjustment_usdt: Amount
    """What the venue's realized PnL adds to the ledger's."""
    open_positions_count: int
    long_positions_count: int
    short_positions_count: int
    by_asset: Mapping[str, AssetView]
    limit_exceeded: bool
    """Whether the whole portfolio's gross exposure is above the limit that is set."""
    unpriced_assets: tuple[str, ...]
    """Assets with an open position that no price is known for: left out of the exposures."""
    stale_assets: tuple[str, ...]
    """Assets with an open position valued at a price older than the staleness threshold."""
    calculated_at: Time
    """The moment of these figures."""

    @classmethod
    def of(
        cls,
        sums: PortfolioSums,
        *,
        max_exposure: Decimal | None,
        now: datetime,
        stale_after: timedelta,
        asset: str | None = None,
    ) -> Self:
        """Return the view of the sums.

        Args:
            sums: of all assets, also where only one is asked for: the limit is the whole portfolio's.
            max_exposure: the limit in USDT; None for none.
            now: the moment the view is taken.
            stale_after: age from which a price is stale.
            asset: the one asset to add up; None for all.
        """
        whole, stale_before = sums.amounts[0], now - stale_after
        if asset is not None:
            part = sums.by_asset.get(asset)
            sums = PortfolioSums()
            if part:
                sums = PortfolioSums(by_asset={asset: part}, amounts=part.amounts, counts=part.counts)
        exposure, net, unrealized, realized, gross, fees, funding, adjustment = sums.amounts
        open_, long, short, _ = sums.counts
        by_asset = sums.by_asset
        with exact():
            return cls(
                total_exposure_usdt=exposure,
                net_exposure_usdt=net,
                portfolio_value_usdt=net,
                total_unrealized_pnl_usdt=unrealized,
                total_realized_pnl_usdt=realized,
                total_pnl_usdt=unrealized + realized,
                total_realized_gross_usdt=gross,
                total_fees_usdt=fees,
                total_funding_usdt=funding,
                total_realized_adjustment_usdt=adjustment,
                open_positions_count=open_,
                long_positions_count=long,
                short_positions_count=short,
                by_asset=ByAsset({name: each.view for name, each in by_asset.items()}),
                limit_exceeded=max_exposure is not None and whole > max_exposure,
                unpriced_assets=tuple(name for name, each in by_asset.items() if each.unpriced),
                stale_assets=tuple(
                    name
                    for name, each in by_asset.items()
                    if each.oldest_price_at is not None and each.oldest_price_at < stale_before
                ),
                calculated_at=now,
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExposureView:
    """The part of a portfolio's figures that tells how much is at stake."""

    __pydantic_config__ = DOCUMENTED

    total_exposure_usdt: Amount
    """Gross: the sum of |size| x price; both legs of a hedged position count."""
    net_exposure_usdt: Amount
    """The sum of size x price."""
    by_asset: Mapping[str, AssetView]
    limit_exceeded: bool
    """Whether the gross exposure is above the limit that is set."""
    unpriced_assets: tuple[str, ...]
    """Assets with an open position that no price is known for: left out of the exposures."""
    stale_assets: tuple[str, ...]
    """Assets with an open position valued at a price older than the staleness threshold."""
    calculated_at: Time


@dataclass(frozen=True, kw_only=True, slots=True)
class PnLView:
    """The part of a portfolio's figures that tells what was won and lost."""

    __pydantic_config__ = DOCUMENTED

    total_unrealized_pnl_usdt: Amount
    total_realized_pnl_usdt: Amount
    """Gross - fees + funding + adjustment, exactly."""
    total_pnl_usdt: Amount
    """Unrealized + realized."""
    total_realized_gross_usdt: Amount
    total_fees_usdt: Amount
    """Paid is positive."""
    total_funding_usdt: Amount
    """Received is positive."""
    total_realized_adjustment_usdt: Amount
    """What the venue's realized PnL adds to the ledger's."""
    by_asset: Mapping[str, AssetView]
    calculated_at: Time


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotView:
    """A position as it was at a moment."""

    __pydantic_config__ = DOCUMENTED

    id: str
    position_id: str
    asset: str
    mode: str
    snapshot_data: Mapping[str, Any]
    """The position object of that moment, what its realized PnL is made of, and the state to fold on from; as
    it was kept, where an older service took the snapshot."""
    created_at: Time
    """The moment it is of."""


def snapshot_data(view: PositionView, row: Mapping[Any, Any]) -> dict[str, object]:
    """Return the complete state of a position, JSON-ready.

    Args:
        view: of the row.
        row: of `positions.storage.tables.positions`.
    """
    beside = (*REALIZED_PARTS, "state")
    return {**object_of(view), **{name: _json(row[name]) for name in beside}}


FLAT_SNAPSHOT = (
    *(field.name for field in fields(SnapshotView) if field.name != "snapshot_data"),
    *(name for name in _FIELDS if name not in {"id", "asset", "mode", "created_at"}),
    "current_price_source",
    *REALIZED_PARTS,
)


def flat_snapshot(view: SnapshotView) -> dict[str, object]:
    """Return what a table shows of a snapshot, JSON-ready: `FLAT_SNAPSHOT`, as far as it was kept."""
    return {**view.snapshot_data, **object_of(view)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionView:
    """An entry of the ledger: what made a position's numbers."""

    __pydantic_config__ = DOCUMENTED

    id: int
    key: str
    """What made it new: the execution's id, or what stands in for it."""
    kind: str
    """`trade`; `funding`; `order_report` (quantity, price and fee are cumulative for the order); `adjustment`
    (a size taken over from the venue); `report` (when a report without a time of its own first arrived)."""
    leg: str
    """`net`, or `long` or `short` in hedge mode."""
    quantity: Amount
    """Signed: sold is negative. Of an adjustment, what it added."""
    price: Amount
    fee: Amount | None
    """In USDT; paid is positive. Null where an order report does not say."""
    executed_at: Time
    time_source: str
    """`event`; or `amqp` or `arrival`, where the message had no time of its own."""
    venue_seq: int | None
    order_id: str | None
    exec_type: str
    trace_id: str
    recorded_at: Time
    """When it was stored."""
    size_after: Amount | None
    """Of an adjustment: the signed size of the leg that was taken over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakView:
    """A difference that reconciliation found."""

    __pydantic_config__ = DOCUMENTED

    kind: str
    """`size`, `average`, `realized`: the venue tells another figure than our fills fold to; `absent`: it
    knows nothing of what we hold; `over_reduction`: more was closed than was held, so a fill is missing;
    `stored_...`: a stored figure is not what the ledger folds to."""
    leg: str
    """`net`, `long` or `short`; `net` also where it is of the position as a whole."""
    ours: Amount
    """What our ledger says; 0 where that is nothing, or no number."""
    theirs: Amount
    """What the venue says, or what was stored."""
    cause: str
    """`missing_fill`, `duplicate`, `funding`, `manual_trade`, `rounding` or `unknown`."""
    detail: str | None
    """The evidence for it, in words."""
    report_id: str | None
    """The venue's report that differs."""
    first_seen_at: Time
    last_seen_at: Time
    resolved_at: Time | None
    resolution: str | None
    """How it ended: `refolded`, the stored figure was set right; `executions_applied`, the ledger was given
    what it lacked; `taken_over`, the venue's figure overruled; `agrees`, it was gone; null: it stands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EquityPoint:
    """What the portfolio was worth at a moment."""

    __pydantic_config__ = DOCUMENTED

    at: Time
    total_exposure_usdt: Amount
    """Gross, over the positions that had a price."""
    net_exposure_usdt: Amount
    total_unrealized_pnl_usdt: Amount
    total_realized_pnl_usdt: Amount
    total_pnl_usdt: Amount
    """Unrealized + realized."""
    drawdown_usdt: Amount
    """How far the total PnL is below its highest since the curve began; 0 or more."""
    positions_count: int
    """How many positions are in these figures: one is from its first snapshot on."""
    unpriced_positions_count: int
    """How many of them were open without a price, and are not in the exposures."""


def part_of(portfolio: Mapping[str, object], part: type[ExposureView | PnLView]) -> dict[str, object]:
    """Return what ``part`` shows of a portfolio object."""
    return {field.name: portfolio[field.name] for field in fields(part)}


def object_of(view: Any) -> dict[str, object]:
    """Return a view as the contract's object, JSON-ready for `to_json`."""
    return {name: _json(getattr(view, name)) for name in _names(view.__class__)}


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _json(value: object) -> object:
    # By exact type, which is quick: an answer has ten thousand values.
    kind = type(value)
    if kind is Decimal:
        return plain(cast(Decimal, value))
    if kind is datetime:
        return utc_text(cast(datetime, value))
    if kind is str or value is None:
        return value
    if kind is ByAsset:
        return cast(ByAsset, value).json
    if isinstance(value, Mapping):
        return {name: _json(each) for name, each in value.items()}
    return value


_TEXTS: Mapping[type, Callable[[Any], str]] = {
    Decimal: lambda value: f'"{plain(value)}"',
    datetime: lambda value: f'"{utc_text(value)}"',
    str: encode_basestring_ascii,
    bool: lambda value: "true" if value else "false",
    int: str,
    NoneType: lambda _: "null",
}


def texts_of(view: PositionView) -> dict[str, str]:
    """Return each field of a view as JSON: what `object_of` and `to_json` make of it, in half the time."""
    return {name: _TEXTS[type(value)](value) for name, value in zip(_FIELDS, _fields(view), strict=True)}


def to_json(data: Mapping[str, object]) -> str:
    """Return an object as JSON."""
    if Json not in map(type, data.values()):
        return _encode(data)
    members = (
        f"{_encode(name)}:{value.text if type(value) is Json else _encode(value)}"
        for name, value in data.items()
    )
    return f"{{{','.join(members)}}}"
