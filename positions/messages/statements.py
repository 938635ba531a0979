"""What the exchange's API tells of the account, as the domain knows it: its positions and executions.

Records are read as those of the exchange's stream are (:mod:`positions.messages.inbound`).
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from positions.domain.events import Entry, PositionKey, Report, TimeSource
from positions.domain.reconciliation import Execution, Statement
from positions.errors import InvalidEvent
from positions.messages.inbound import Delivery, decode

Record = Mapping[str, Any]

SOURCE = "venue"
RECORD_MAX_BYTES = 65_536
# The rest, mark and unrealized PnL among it, is of the moment of asking, not of the record's time.
_LASTING = ("symbol", "side", "size", "avgPrice", "positionIdx", "updatedTime", "seq", "cumRealisedPnl")


def statement(record: Record, *, now: datetime, trace_id: str) -> Sequence[Statement]:
    """Return what the record of a position says: none where it is flat and of no time.

    Raises:
        InvalidEvent: it cannot be read.
    """
    lasting = {name: record[name] for name in _LASTING if record.get(name) not in (None, "")}
    if lasting.get("updatedTime") in ("0", 0):
        del lasting["updatedTime"]
    reports = [each for each in _events("position", lasting, now, trace_id) if isinstance(each, Report)]
    if any(each.size is None for each in reports):
        raise InvalidEvent("missing", "size")
    timed = [each for each in reports if each.time_source is TimeSource.EVENT]
    if any(each.size for each in reports) and not timed:
        raise InvalidEvent("missing", "updatedTime")
    created = str(record.get("createdTime"))
    since = datetime.fromtimestamp(int(created) / 1000, UTC) if re.fullmatch("[0-9]{13}", created) else None
    return [Statement(report=each, created_at=since) for each in timed]


def executions(
    records: Iterable[Record], key: PositionKey, *, now: datetime, trace_id: str
) -> list[Execution]:
    """Return the executions of a position; the exchange does not say in which mode they were made.

    Raises:
        InvalidEvent: one of them cannot be read: what is told of the others is not all.
    """
    found: list[Execution] = []
    for record in records:
        if not record.get("execId"):
            raise InvalidEvent("missing", "execId")
        by_hand = not record.get("orderLinkId") and record.get("createType") in (None, "", "CreateByUser")
        events = _events("execution", {**record, "mode": key.mode}, now, trace_id)
        found += [Execution(entry=each, by_hand=by_hand) for each in events if isinstance(each, Entry)]
    return found


def _events(topic: str, record: Record, now: datetime, trace_id: str) -> Iterable[Entry | Report]:
    body = json.dumps({"topic": topic, "data": [record], "trace_id": trace_id}, default=str).encode()
    delivery = Delivery(queue=SOURCE, body=body, headers={}, properties={}, received_at=now)
    return decode(delivery, max_bytes=RECORD_MAX_BYTES).events
