"""Validate positions: what is stored, what the ledger folds to, what reports and the venue say."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

import structlog
from sqlalchemy import Connection, Engine

from positions.domain.breaks import breaks_of
from positions.domain.events import PositionKey
from positions.errors import ConcurrencyConflict, NotFound
from positions.handlers.rebuild_position import Comparison, compared
from positions.handlers.reconcile_position import Answers, Reconciled, Venue, reconcile_position
from positions.handlers.validate_position import Validation, validate_position
from positions.handlers.write_changes import Rules
from positions.storage import breaks, positions, validations
from positions.storage.database import Retry, in_transaction, transaction

log = structlog.get_logger(__name__)

RUN_MAX = 2_000
"""So many positions in one run at most; the next goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validator:
    """Validates positions, each in short transactions of its own, and asks the venue between them."""

    engine: Engine
    rules: Rules
    retry: Retry
    venue: Venue | None
    """None: what the venue says is not asked."""
    fix: bool
    """Whether anything is written."""
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)

    def run(
        self, *, limit: int | None = RUN_MAX, seconds: float = math.inf
    ) -> Iterator[tuple[PositionKey, Validation]]:
        """Validate the positions whose turn it is, and those that only the venue knows of.

        That it was done is kept position by position, so that a run that is cut short is gone on with by the
        next.

        Args:
            limit: so many at most of each; None: all.
            seconds: no further one is begun after so long.
        """
        started = time.monotonic()
        answers = self._answers()
        with transaction(self.engine) as connection:
            due = validations.due(connection, limit=limit)
            stored = set(positions.keys(connection))
        new = sorted(answers.listed().keys() - stored)[:limit] if answers else []
        for key in [*new, *due]:
            if time.monotonic() - started > seconds:
                log.warning("validation_cut_short", seconds=seconds)
                return
            try:
                found = self._validate(key, answers, scheduled=True)
            except NotFound:
                continue
            except ConcurrencyConflict:
                log.warning("validation_put_off", asset=key.asset, mode=key.mode)
                continue
            yield key, found

    def one(self, key: PositionKey) -> Validation:
        """Validate one position.

        Raises:
            NotFound: there is none.
            ConcurrencyConflict: it kept changing.
        """
        return self._validate(key, self._answers(), scheduled=False)

    def _answers(self) -> Answers | None:
        return Answers(self.venue, clock=self.clock, trace_id=uuid4().hex) if self.venue else None

    def _validate(self, key: PositionKey, answers: Answers | None, *, scheduled: bool) -> Validation:
        reads = self.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        found, doubted = in_transaction(
            reads, lambda connection: _stored(connection, key, self.rules), retry=self.retry
        )
        if found is None and not scheduled:
            raise NotFound(f"There is no {key.mode} position in {key.asset}.")
        reconciled = None
        if answers is not None:
            reconciled = reconcile_position(
                self.engine,
                key,
                found,
                answers,
                doubted=doubted,
                listing=scheduled,
                rules=self.rules,
                retry=self.retry,
                clock=self.clock,
                fix=self.fix,
            )
        validation = Validation(is_valid=True, error_message=None, breaks=(), updated=False)
        if found is None or _doubtful(found, doubted, reconciled):
            validation = in_transaction(
                self.engine if self.fix else reads,
                lambda connection: validate_position(
                    connection, key, rules=self.rules, now=self.clock(), fix=self.fix, reconciled=reconciled
                ),
                retry=self.retry,
            )
        if scheduled and self.fix and not (answers and key in answers.put_off):
            with transaction(self.engine) as connection:
                validations.record(
                    connection,
                    key,
                    validation.outcome,
                    agreed=reconciled.agreed_at if reconciled else None,
                    now=self.clock(),
                )
        return validation


def _stored(
    connection: Connection, key: PositionKey, rules: Rules
) -> tuple[Comparison | None, frozenset[str]]:
    """Return a position and the legs that have breaks which stand; None where there is none."""
    try:
        found = compared(connection, key, rules=rules, lock=False)
    except NotFound:
        return None, frozenset()
    rows = breaks.listed(connection, found.stored.id, open_only=True)
    return found, frozenset(row["leg"] for row in rows)


def _doubtful(found: Comparison, doubted: frozenset[str], reconciled: Reconciled | None) -> bool:
    standing = any(each.taken_over_at is None for each in breaks_of(found.state).values())
    return bool(found.differences or standing or doubted or (reconciled and reconciled.found))
