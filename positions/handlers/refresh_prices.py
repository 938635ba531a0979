"""Value positions whose price is missing or grows stale at what the exchange says."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial

import structlog
from sqlalchemy import Engine

from positions.domain.events import PositionKey
from positions.domain.numbers import exact
from positions.domain.position import Mark
from positions.domain.prices import near, plausible
from positions.errors import VenueUnavailable
from positions.handlers.update_marks import update_marks
from positions.handlers.write_changes import Rules
from positions.storage import positions
from positions.storage.database import Retry, in_transaction, transaction
from positions.venue.bybit import Bybit, Tickers

log = structlog.get_logger(__name__)

SOURCE = "price_api"
DUE_MAX = 5000
"""Positions of one run; the oldest prices come first."""
BATCH = 20
"""Positions of one transaction: an event that waits for one hardly notices (benchmarks/prices.py)."""
CONFIRM_S = 5.0
"""How much later a price that jumped is read a second time."""
_LOGGED = 20


def refresh_prices(
    engine: Engine,
    venue: Bybit,
    *,
    rules: Rules,
    retry: Retry,
    due_before: datetime,
    sleep: Callable[[float], None] = time.sleep,
) -> Counter[str]:
    """Value open positions whose price is missing or from before ``due_before``, and return the counts.

    `due`, then `priced`; `unlisted` (the exchange has no such symbol), `refused` (what it says is no price),
    `doubted` (a jump that a second reading did not confirm) and `busy` (others kept changing the position)
    stay as they are until the next run. No transaction is open while the exchange is asked.

    Raises:
        VenueUnavailable: it does not answer; nothing was changed.
        Unavailable: the database does not; positions that were priced stay so.
    """
    with transaction(engine) as connection:
        due = positions.priced_before(connection, due_before, limit=DUE_MAX)
    counts = Counter(due=len(due))
    if due:
        told = venue.tickers({key.asset for key in due})
        marks = _believed(venue, due, told, counts, sleep=sleep)
        _write(engine, marks, counts, rules=rules, retry=retry, due_before=due_before, sleep=sleep)
        unlisted = [key.asset for key in due if key.asset not in told.prices.keys() | told.refused.keys()]
        if unlisted:
            log.warning("price_unlisted", assets=unlisted[:_LOGGED])
        counts["unlisted"] = len(unlisted)
    return counts


def _believed(
    venue: Bybit,
    due: Mapping[PositionKey, Mark | None],
    told: Tickers,
    counts: Counter[str],
    *,
    sleep: Callable[[float], None],
) -> dict[PositionKey, Mark]:
    """Return the prices to take: those that did not jump, and those of a second reading that did twice."""
    for asset, reason in list(told.refused.items())[:_LOGGED]:
        log.warning("price_refused", asset=asset, reason=reason)
    counts["refused"] = sum(key.asset in told.refused for key in due)
    marks, doubted = {}, []
    with exact():
        for key, known in due.items():
            price = told.prices.get(key.asset)
            if price is None:
                continue
            if plausible(price, told.at, known):
                marks[key] = Mark(price=price, at=told.at, source=SOURCE)
            else:
                doubted.append(key)
    if not doubted:
        return marks
    sleep(CONFIRM_S)
    try:
        again = venue.tickers({key.asset for key in doubted})
    except VenueUnavailable as error:
        log.warning("price_not_confirmed", reason=str(error))
        again = told
    for key in doubted:
        first, second = told.prices[key.asset], again.prices.get(key.asset)
        with exact():
            # The same answer again, from a cache, is no second reading.
            agrees = second is not None and again.at > told.at and near(first, second)
        known = due[key]
        log.warning(
            "price_jumped",
            asset=key.asset,
            mode=key.mode,
            known=known and str(known.price),
            known_source=known and known.source,
            read=[str(first), second and str(second)],
            taken=agrees,
        )
        if agrees and second is not None:
            marks[key] = Mark(price=second, at=again.at, source=SOURCE)
        else:
            counts["doubted"] += 1
    return marks


def _write(
    engine: Engine,
    marks: Mapping[PositionKey, Mark],
    counts: Counter[str],
    *,
    rules: Rules,
    retry: Retry,
    due_before: datetime,
    sleep: Callable[[float], None],
) -> None:
    """Write ``marks``, some in a transaction, and those that others were changing again, later."""
    left = sorted(marks)
    for attempt in range(retry.retries + 1):
        busy = []
        for start in range(0, len(left), BATCH):
            keys = left[start : start + BATCH]
            write = partial(
                update_marks,
                marks={key: marks[key] for key in keys},
                rules=rules,
                now=datetime.now(UTC),
                due_before=due_before,
            )
            written = in_transaction(engine, write, retry=retry, sleep=sleep)
            counts["priced"] += sum(written.values())
            busy += [key for key in keys if key not in written]
        left = busy
        if left and attempt < retry.retries:
            sleep(retry.wait_ms(attempt + 1) / 1000)
    counts["busy"] = len(left)
