"""Reconcile a position with the venue's own record of it: keep what differs, correct what the rules allow."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Protocol

import structlog
from sqlalchemy import Connection, Engine

from positions.domain.breaks import Break, BreakKind, breaks_of
from positions.domain.events import Entry, Kind, LegName, PositionKey, Report
from positions.domain.numbers import ZERO, exact
from positions.domain.position import State, empty
from positions.domain.reconciliation import SETTLED_AFTER, Judgement, Statement, Window, judge
from positions.errors import InvalidEvent, VenueRefused, VenueUnavailable
from positions.handlers.apply_events import apply_events
from positions.handlers.rebuild_position import Comparison, compared
from positions.handlers.write_changes import Rules
from positions.messages.statements import Record, executions, statement
from positions.storage import breaks, positions, validations
from positions.storage.database import Retry, in_transaction, transaction

log = structlog.get_logger(__name__)

LOOK_BACK = timedelta(days=7)
"""How far back executions are asked for where the venue has never said the same."""
LOOK_BACK_MAX = timedelta(days=28)
LOOK_BACK_SHORT = timedelta(hours=1)
"""Where there are more than the venue tells at a time."""
BY_NAME_MAX = 50
"""So many positions that the venue did not list are asked for by name in one run."""
IN_DOUBT_MAX = 50
"""For so many positions executions are asked for in one run."""

EXECUTIONS_APPLIED, TAKEN_OVER, AGREES = "executions_applied", "taken_over", "agrees"

Found = Mapping[tuple[LegName, BreakKind], Break]


class Venue(Protocol):
    """What the account is asked for; both tell all, or raise."""

    def positions(self, *, symbol: str | None = None) -> Sequence[Record]:
        """Return the records of a symbol, flat or not; of all that are open without one."""

    def executions(self, *, symbol: str, since: datetime, until: datetime) -> Sequence[Record]:
        """Return the records of all executions of that time."""


class Answers:
    """What the venue answered in one run: all open positions at once, others by name, within limits."""

    def __init__(self, venue: Venue, *, clock: Callable[[], datetime], trace_id: str) -> None:
        """Ask nothing yet."""
        self._venue, self._clock, self.trace_id = venue, clock, trace_id
        self._listed: Mapping[PositionKey, Sequence[Statement]] | None = None
        self._by_name = BY_NAME_MAX
        self._in_doubt = IN_DOUBT_MAX
        self.put_off: set[PositionKey] = set()
        """The positions that there was no more time for in this run."""
        self.away: str | None = None
        """Why it is asked no more."""

    def listed(self) -> Mapping[PositionKey, Sequence[Statement]]:
        """Return what it says of all positions that are open there; nothing where it is away."""
        if self._listed is None:
            self._listed = {}
            try:
                asked_at = self._clock()
                self._listed, _ = self._read(self._venue.positions(), asked_at)
            except (VenueUnavailable, VenueRefused) as error:
                self.away = str(error)
                log.warning("venue_failed", reason=self.away)
        return self._listed

    def of(self, key: PositionKey, held: Collection[LegName], *, listing: bool) -> Sequence[Statement] | None:
        """Return what the venue says of a position; None where that is not known.

        Asked by name where the list has not all of the legs ``held``: the list has only what is open. A leg
        that is unknown even then is one the venue is silent of.
        """
        found = self.listed().get(key, ()) if listing else ()
        if self.away is not None:
            return None
        if listing and {*held} <= {each.report.leg for each in found}:
            return found
        if not self._by_name:
            self.put_off.add(key)
            return None
        self._by_name -= 1
        asked_at = self._clock()
        try:
            by_name, whole = self._read(self._venue.positions(symbol=key.asset), asked_at)
        except (VenueUnavailable, VenueRefused) as error:
            # Refused is a symbol that it does not know: nothing is known of it then.
            log.warning("venue_failed", asset=key.asset, reason=str(error))
            return None
        if not whole:
            return None
        found = by_name.get(key, ())
        silent = {*held} - {each.report.leg for each in found}
        return (*found, *(_silence(key, leg, asked_at) for leg in sorted(silent)))

    def window(self, key: PositionKey, since: datetime, until: datetime) -> Window | None:
        """Return the executions of that time, of the last hour of it if there are too many; None: unknown."""
        if self.away:
            return None
        if not self._in_doubt:
            self.put_off.add(key)
            return None
        self._in_doubt -= 1
        for start in (since, until - LOOK_BACK_SHORT):
            try:
                told = self._venue.executions(symbol=key.asset, since=start, until=until)
                found = executions(told, key, now=self._clock(), trace_id=self.trace_id)
                return Window(since=start, until=until, executions=found, whole=start == since)
            except VenueUnavailable as error:
                log.warning("venue_failed", asset=key.asset, reason=str(error))
            except (VenueRefused, InvalidEvent) as error:
                log.warning("venue_refused", asset=key.asset, reason=str(error))
                break
        return None

    def _read(
        self, records: Sequence[Record], asked_at: datetime
    ) -> tuple[Mapping[PositionKey, Sequence[Statement]], bool]:
        """Return what the records say, and whether all of them could be read."""
        found: dict[PositionKey, dict[LegName, Statement]] = {}
        whole = True
        for record in records:
            try:
                said = statement(record, now=self._clock(), trace_id=self.trace_id)
            except InvalidEvent as error:
                log.warning("venue_record_refused", reason=str(error), asset=str(record.get("symbol"))[:40])
                whole = False
                continue
            for each in said:
                of_key = found.setdefault(each.report.position, {})
                known = of_key.get(each.report.leg)
                # Twice on pages that moved meanwhile: the newer one counts.
                if known is None or known.report.at < each.report.at:
                    of_key[each.report.leg] = replace(each, asked_at=asked_at)
        return {key: list(legs.values()) for key, legs in found.items()}, whole


def _silence(key: PositionKey, leg: LegName, at: datetime) -> Statement:
    return Statement(report=Report(id="silence", position=key, leg=leg, at=at, size=ZERO), silent=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconciled:
    """What became of the comparison with the venue."""

    found: Found
    """The breaks that there were."""
    resolution: str | None = None
    """What was done; None where nothing was."""
    ended: frozenset[tuple[LegName, BreakKind]] = frozenset()
    """The breaks that were gone then."""
    agreed_at: datetime | None = None
    """Until when both said the same."""


def reconcile_position(
    engine: Engine,
    key: PositionKey,
    found: Comparison | None,
    answers: Answers,
    *,
    doubted: Collection[str] = (),
    listing: bool,
    rules: Rules,
    retry: Retry,
    clock: Callable[[], datetime],
    fix: bool,
) -> Reconciled | None:
    """Compare a position with what the venue says of it; None where the venue says nothing.

    Holds no transaction while it asks. To ``fix``: breaks are kept with their causes, those that are gone are
    resolved; executions that the ledger lacks are applied as any other is, once; where they explain nothing,
    what the venue's record says of size and average is applied as a report of its time, which decides by the
    rules whether it overrules (docs/decisions).

    Args:
        engine: for reading and writing.
        key: which position.
        found: it, as it is stored; None where there is none.
        answers: of the venue.
        doubted: legs with breaks that stand: asked for even where they are flat.
        listing: whether to look into the venue's list of all positions, instead of asking for this one.
        rules: who wins.
        retry: of what is written.
        clock: the time, UTC.
        fix: whether anything is written.
    """
    state = found.state if found else empty(key)
    entries = found.entries if found else ()
    asked_at = clock()
    wanted = [leg for leg, each in state.held.items() if each.leg.size or leg in doubted]
    told = answers.of(key, wanted, listing=listing)
    if not told:
        return None
    with exact():
        judgement = judge(state, entries, told, None, policy=rules.policy, now=asked_at)
    window = None
    if judgement.doubtful or any(leg.missing for leg in state.ledger.values()):
        with transaction(engine) as connection:
            agreed = validations.agreed_at(connection, found.stored.id) if found else None
        since = agreed - SETTLED_AFTER if agreed else asked_at - LOOK_BACK
        # The last fill too: that the venue knows it shows that it speaks of our account.
        last = max((each.executed_at for each in entries if each.kind is not Kind.REPORT), default=since)
        since = max(min(since, last), asked_at - LOOK_BACK_MAX)
        window = answers.window(key, since, clock())
        with exact():
            judgement = judge(state, entries, told, window, policy=rules.policy, now=asked_at)
    done = Reconciled(found=judgement.breaks)
    if fix and (doubted or judgement.breaks or judgement.overrule):
        write = _Write(
            key=key,
            judged=found.stored.version if found else None,
            judge=lambda state, entries: judge(
                state, entries, told, window, policy=rules.policy, now=asked_at
            ),
            rules=rules,
            now=clock(),
        )
        judgement = in_transaction(engine, lambda connection: write.keep(connection, judgement), retry=retry)
        done = Reconciled(found=judgement.breaks)
        if judgement.missing or judgement.overrule:
            done = in_transaction(
                engine, lambda connection: write.correct(connection, judgement), retry=retry
            )
            log.warning(
                "position_reconciled",
                asset=key.asset,
                mode=key.mode,
                resolution=done.resolution,
                executions=len(judgement.missing),
                ended=[f"{leg} {kind}" for leg, kind in sorted(done.ended)],
                trace_id=answers.trace_id,
            )
    if judgement.doubtful or any(each.silent for each in told):
        return done
    return replace(done, agreed_at=asked_at - SETTLED_AFTER)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Write:
    """What is written of a judgement, in two transactions: first what was found, then what corrects it."""

    key: PositionKey
    judged: int | None
    """The version that was judged; None: there was no position."""
    judge: Callable[[State, Sequence[Entry]], Judgement]
    rules: Rules
    now: datetime

    def keep(self, connection: Connection, judgement: Judgement) -> Judgement:
        """Keep the breaks that were found and resolve those that are gone; return the judgement that counts.

        A position that changed meanwhile is judged again: somebody else may have set it right.
        """
        # Locked in the order of who applies events: the position, then its breaks.
        stored = positions.lock(connection, [self.key]).get(self.key)
        if stored is None:
            return judgement
        if stored.version != self.judged:
            found = compared(connection, self.key, rules=self.rules, lock=True)
            with exact():
                judgement = self.judge(found.state, found.entries)
        known = {(row["leg"], row["kind"]) for row in breaks.listed(connection, stored.id, open_only=True)}
        for (leg, kind), each in judgement.breaks.items():
            if (leg, kind) not in known:
                log.warning(
                    "break_found",
                    asset=self.key.asset,
                    mode=self.key.mode,
                    leg=leg,
                    kind=kind,
                    ours=str(each.ours),
                    theirs=str(each.theirs),
                    cause=each.cause,
                )
        standing = [(stored.id, *place, each) for place, each in judgement.breaks.items()]
        breaks.keep(connection, standing, now=self.now)
        gone = judgement.agreed & known - breaks_of(stored.state).keys()
        ended = [(stored.id, *place) for place in sorted(gone)]
        breaks.resolve(connection, ended, resolution=AGREES, now=self.now)
        return judgement

    def correct(self, connection: Connection, judgement: Judgement) -> Reconciled:
        """Apply what was missing, or else what the venue says, and resolve the breaks that ended."""
        # As if it came by a queue; however late it is, it holds up nothing but this position.
        outcome = apply_events(
            connection,
            judgement.missing or judgement.overrule,
            [],
            rules=self.rules,
            now=self.now,
            patient=True,
            source="validation",
        )
        if not outcome.counts["applied"]:
            # Somebody else was first.
            return Reconciled(found={})
        found = compared(connection, self.key, rules=self.rules, lock=True)
        with exact():
            after = self.judge(found.state, found.entries)
        resolution = EXECUTIONS_APPLIED if judgement.missing else TAKEN_OVER
        ended = {place: each for place, each in judgement.breaks.items() if place not in after.breaks}
        if self.judged is None:
            # There was no position yet to keep them of.
            kept = [(found.stored.id, *place, each) for place, each in ended.items()]
            breaks.keep(connection, kept, now=self.now)
        breaks.resolve(
            connection,
            [(found.stored.id, *place) for place in ended],
            resolution=resolution,
            now=self.now,
        )
        return Reconciled(found=judgement.breaks, resolution=resolution, ended=frozenset(ended))
