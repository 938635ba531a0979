"""The fold's state as JSON: every digit kept, empty parts left out."""

import json
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from positions.domain.events import LegName, PositionKey, Report, TimeSource
from positions.domain.leg import FillOrder, Leg
from positions.domain.numbers import ZERO, plain
from positions.domain.position import Held, Mark, Point, State, Takeover, empty
from positions.domain.times import utc_text

dumps = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
"""What writes a state's data as text."""

_LEG_AMOUNTS = ("size", "cost", "gross", "fees", "funding", "missing")
_LEG_TIMES = ("opened_at", "closed_at", "traded_at", "touched_at")
_REPORT_AMOUNTS = ("size", "average", "unrealized", "realized", "mark")


def encode(state: State) -> dict[str, Any]:
    """Return ``state`` as JSON-ready data."""
    data: dict[str, Any] = {"ledger": {name: _leg(leg) for name, leg in state.ledger.items()}}
    # Where no report overrules the fills, what is held is the ledger's fold: not written twice.
    held = _all_held(state.ledger, state.held)
    if held:
        data["held"] = held
    if state.reports:
        data["reports"] = [_report(report) for report in state.reports]
    if state.last:
        data["last"] = [utc_text(state.last.at), state.last.seq, state.last.key]
    if state.since_point:
        data["since_point"] = state.since_point
    if state.api_mark:
        mark = state.api_mark
        data["api_mark"] = [plain(mark.price), utc_text(mark.at), mark.source]
    return data


def decode(key: PositionKey, data: dict[str, Any] | None) -> State:
    """Return the state that `encode` wrote; an empty one for None."""
    blank = empty(key)
    if data is None:
        return blank
    ledger = {name: _to_leg(data["ledger"].get(name, {})) for name in blank.ledger}
    held = _to_all_held(ledger, data)
    last, mark = data.get("last"), data.get("api_mark")
    return State(
        key=key,
        ledger=ledger,
        held=held,
        reports=tuple(_to_report(key, report) for report in data.get("reports", ())),
        last=FillOrder(_to_time(last[0]), last[1], last[2]) if last else None,
        since_point=data.get("since_point", 0),
        api_mark=Mark(price=Decimal(mark[0]), at=_to_time(mark[1]), source=mark[2]) if mark else None,
    )


def encode_point(point: Point) -> dict[str, Any]:
    """Return what `decode_point` needs beside the point's order."""
    data: dict[str, Any] = {"ledger": {name: _leg(leg) for name, leg in point.ledger.items()}}
    if held := _all_held(point.ledger, point.held):
        data["held"] = held
    return data


def decode_point(order: FillOrder, data: dict[str, Any]) -> Point:
    """Return the point that `encode_point` wrote."""
    ledger = {LegName(name): _to_leg(leg) for name, leg in data["ledger"].items()}
    return Point(order=order, ledger=ledger, held=_to_all_held(ledger, data))


def _all_held(ledger: Mapping[LegName, Leg], held: Mapping[LegName, Held]) -> dict[str, Any]:
    """Return what is held where a report has said something of the leg."""
    return {name: _held(each, ledger[name]) for name, each in held.items() if each != Held(ledger[name])}


def _to_all_held(ledger: Mapping[LegName, Leg], data: dict[str, Any]) -> dict[LegName, Held]:
    held = data.get("held", {})
    return {name: _to_held(held[name], leg) if name in held else Held(leg) for name, leg in ledger.items()}


def _to_time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _leg(leg: Leg) -> dict[str, str]:
    data = {name: plain(amount) for name in _LEG_AMOUNTS if (amount := getattr(leg, name))}
    data.update((name, utc_text(at)) for name in _LEG_TIMES if (at := getattr(leg, name)))
    # Nearly always the time of the last trade: said only where it is not.
    if leg.certain_at != leg.traded_at:
        data["certain_at"] = utc_text(leg.certain_at) if leg.certain_at else ""
    return data


def _to_leg(data: dict[str, str]) -> Leg:
    values: dict[str, Any] = {name: Decimal(data[name]) for name in _LEG_AMOUNTS if name in data}
    values.update((name, _to_time(data[name])) for name in _LEG_TIMES if name in data)
    certain = data.get("certain_at")
    values["certain_at"] = (
        values.get("traded_at") if certain is None else _to_time(certain) if certain else None
    )
    return Leg(**values)


def _held(held: Held, folded: Leg) -> dict[str, Any]:
    data: dict[str, Any] = {"basis": held.basis}
    if held.leg != folded:
        data["leg"] = _leg(held.leg)
    if held.venue_realized:
        data["venue_realized"] = plain(held.venue_realized)
    if held.disputed:
        data["disputed"] = [held.disputed, plain(held.disputed_size)]
    if held.averaged:
        data["averaged"] = True
    if held.refused:
        data["refused"] = held.refused
    if taken := held.takeover:
        average = None if taken.average is None else plain(taken.average)
        data["takeover"] = [
            taken.report_id,
            utc_text(taken.at),
            plain(taken.size),
            average,
            plain(taken.found),
        ]
    return data


def _to_held(data: dict[str, Any], folded: Leg) -> Held:
    taken = data.get("takeover")
    return Held(
        leg=_to_leg(data["leg"]) if "leg" in data else folded,
        venue_realized=Decimal(data["venue_realized"]) if "venue_realized" in data else ZERO,
        takeover=taken
        and Takeover(
            taken[0],
            _to_time(taken[1]),
            Decimal(taken[2]),
            None if taken[3] is None else Decimal(taken[3]),
            Decimal(taken[4]),
        ),
        disputed=data["disputed"][0] if "disputed" in data else None,
        disputed_size=Decimal(data["disputed"][1]) if "disputed" in data else ZERO,
        averaged=data.get("averaged", False),
        refused=tuple(data.get("refused", ())),
        basis=tuple(data["basis"]),
    )


def _report(report: Report) -> dict[str, Any]:
    data: dict[str, Any] = {"id": report.id, "leg": report.leg, "at": utc_text(report.at)}
    if report.time_source is not TimeSource.EVENT:
        data["time_source"] = report.time_source
    if not report.sided:
        data["sided"] = False
    if report.trace_id:
        data["trace_id"] = report.trace_id
    if report.seq is not None:
        data["seq"] = report.seq
    data.update(
        (name, plain(amount)) for name in _REPORT_AMOUNTS if (amount := getattr(report, name)) is not None
    )
    return data


def _to_report(key: PositionKey, data: dict[str, Any]) -> Report:
    amounts: dict[str, Any] = {name: Decimal(data[name]) for name in _REPORT_AMOUNTS if name in data}
    return Report(
        id=data["id"],
        position=key,
        leg=LegName(data["leg"]),
        at=_to_time(data["at"]),
        time_source=TimeSource(data.get("time_source", TimeSource.EVENT)),
        seq=data.get("seq"),
        sided=data.get("sided", True),
        trace_id=data.get("trace_id", ""),
        **amounts,
    )
