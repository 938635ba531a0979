"""What must be true when a chaos run has come to rest."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

from sqlalchemy import Engine, select

from positions.domain.position import Policy
from positions.handlers.rebuild_position import rebuild_position
from positions.handlers.write_changes import Rules
from positions.storage import positions as store
from positions.storage import tables
from positions.storage.database import transaction
from tests.chaos.market import TOLERANCE, Expected, Market
from tests.integration.support import RULES, channel_of

PUBLISHED_QUEUE = "position-manager.position_updated"

TOLD = ("size", "average_entry_price", "current_price", "unrealized_pnl", "realized_pnl")
"""Figures of a position that are published as they are stored."""


@dataclass(frozen=True, slots=True)
class Check:
    """One promise and what was found against it; nothing, where it was kept."""

    promise: str
    broken: Sequence[str]
    shown: str = ""


def published(url: str) -> list[dict[str, Any]]:
    """Take all `position_updated` messages off their queue, in their order."""
    found: list[dict[str, Any]] = []
    with closing(channel_of(url)) as connection, closing(connection.channel()) as channel:
        waiting = channel.queue_declare(PUBLISHED_QUEUE, passive=True).message_count
        channel.basic_consume(
            PUBLISHED_QUEUE, no_ack=True, callback=lambda message: found.append(json.loads(message.body))
        )
        while len(found) < waiting:
            connection.drain_events(timeout=30)
    return found


def checks(
    engine: Engine, market: Market, events: Sequence[dict[str, Any]], left: dict[str, int]
) -> list[Check]:
    """Compare what is stored and was published with what must be.

    Args:
        engine: the database of the run.
        market: what was published, all of it confirmed.
        events: all `position_updated` messages, in the order of their queue.
        left: messages left in queues once their consumers are gone.
    """
    with engine.connect() as connection:
        keys = Counter(
            connection.execute(
                select(tables.ledger.c.key).where(
                    tables.ledger.c.kind.in_(("trade", "funding", "order_report"))
                )
            ).scalars()
        )
        rows = connection.execute(select(tables.positions)).mappings().all()
        parked = connection.execute(select(tables.quarantine.c.body, tables.quarantine.c.reason))
        kept = {bytes(body): reason for body, reason in parked}
        counted = connection.execute(select(tables.attempts)).all()
    known = {(row["asset"], row["mode"]): dict(row) for row in rows}
    missing, strange = market.keys - keys.keys(), keys.keys() - market.keys
    return [
        Check("every event that was confirmed is in the ledger", sorted(missing), f"{len(keys)} entries"),
        Check(
            "nothing else is in it, and nothing twice",
            sorted(strange | {k for k, n in keys.items() if n > 1}),
        ),
        Check(
            "positions are what an independent recomputation gives",
            list(differences(market.positions, known)),
            f"{len(known)} positions",
        ),
        Check("positions are the fold of the ledger, digit for digit", list(_not_the_fold(engine))),
        Check(
            "each commit is published, in the order of versions",
            list(_wrongly_published(known, events)),
            f"{len(events)} messages, {len(events) - len(_versions(events))} of them again",
        ),
        Check(
            "queues and outbox are empty, nothing is unacknowledged",
            [f"{k}: {n}" for k, n in left.items() if n],
        ),
        Check(
            "quarantine holds the poison and nothing else",
            [f"missing: {body!r}" for body in sorted(market.poison.keys() - kept.keys())]
            + [f"no poison: {body!r}: {kept[body]}" for body in sorted(kept.keys() - market.poison.keys())],
            f"{len(kept)} messages",
        ),
        Check(
            "the reasons in quarantine are true",
            [
                f"{body!r}: {reason}"
                for body, reason in sorted(kept.items())
                if not reason.startswith(market.poison.get(body, ""))
            ],
        ),
        Check("nothing is suspected any more", [f"{row.digest}: {row.alone}" for row in counted]),
    ]


def differences(
    expected: dict[tuple[str, str], Expected], found: dict[tuple[str, str], dict[str, Any]]
) -> Iterator[str]:
    """Yield what is not as ``expected`` in the rows ``found``, both by asset and mode."""
    for key in sorted(expected.keys() | found.keys()):
        if key not in found or key not in expected:
            yield f"{key}: {'not stored' if key not in found else 'unknown'}"
            continue
        row, wanted = found[key], expected[key]
        figures = {
            "size": wanted.size,
            "average_entry_price": wanted.average,
            "realized_gross": wanted.gross,
            "fees_paid": wanted.fees,
            "funding_received": wanted.funding,
            "realized_pnl": wanted.realized,
            "unrealized_pnl": wanted.unrealized,
            "current_price": wanted.mark,
        }
        for name, value in figures.items():
            if value is None:
                continue
            stored = row[name]
            if stored is None or abs(Fraction(stored) - value) > TOLERANCE * (1 + abs(value)):
                yield f"{key} {name}: stored {stored}, recomputed {float(value)}"


def _not_the_fold(engine: Engine) -> Iterator[str]:
    rules = Rules(policy=Policy(), price_stale_after=RULES.price_stale_after)
    with transaction(engine) as connection:
        keys = store.keys(connection)
    for key in keys:
        with transaction(engine) as connection:
            found = rebuild_position(connection, key, rules=rules, now=datetime.now(UTC), repair=False)
        for name, (stored, folded) in found.items():
            yield f"{key.asset} {key.mode} {name}: stored {stored}, the ledger folds to {folded}"


def _versions(events: Sequence[dict[str, Any]]) -> set[tuple[str, int]]:
    return {(event["position_id"], event["version"]) for event in events}


def _wrongly_published(
    known: dict[tuple[str, str], dict[str, Any]], events: Sequence[dict[str, Any]]
) -> Iterator[str]:
    first: defaultdict[str, list[int]] = defaultdict(list)
    last: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["version"] not in first[event["position_id"]]:
            first[event["position_id"]].append(event["version"])
            last[event["position_id"]] = event
    for (asset, mode), row in known.items():
        id_ = str(row["id"])
        told = first.pop(id_, [])
        if told != list(range(1, row["version"] + 1)):
            absent = sorted(set(range(1, row["version"] + 1)) - set(told))
            found = f"{len(told)} of {row['version']} versions, absent {absent[:5]}, or in disorder"
            yield f"{asset} {mode}: {found}"
            continue
        for name in TOLD:
            said, stored = last[id_][name], row[name]
            if (None if said is None else Fraction(said)) != (None if stored is None else Fraction(stored)):
                yield f"{asset} {mode} {name}: last told {said}, stored is {stored}"
    for id_, versions in first.items():
        yield f"{id_}: {len(versions)} messages about no position"
