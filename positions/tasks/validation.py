"""The job that compares all positions with the ledger, the reports and the exchange."""

import time
from collections import Counter

import structlog

from positions import metrics
from positions.handlers.validate_positions import Validator
from positions.handlers.write_changes import Rules
from positions.storage import validations
from positions.tasks import resources
from positions.tasks.jobs import SOFT_LIMIT_S, job

log = structlog.get_logger(__name__)

RUN_S = SOFT_LIMIT_S / 2
"""No further position is begun after so long: each may have to wait for the exchange."""


@job(name="positions.validate")
def validate() -> dict[str, int]:
    """Validate the positions whose turn it is, and return how many had which outcome."""
    started = time.perf_counter()
    own = resources.current()
    validator = Validator(
        engine=own.engine,
        rules=Rules.of(own.settings),
        retry=own.retry,
        venue=own.venue if own.venue.signs else None,
        fix=True,
    )
    counts: Counter[str] = Counter()
    with validations.alone(own.engine) as alone:
        if not alone:
            log.info("validation_skipped", reason="another run is at work")
            return {}
        try:
            for _, found in validator.run(seconds=RUN_S):
                counts[found.outcome] += 1
                metrics.VALIDATIONS.inc(found.outcome)
                counts["breaks"] += len(found.breaks)
        finally:
            duration_ms = round((time.perf_counter() - started) * 1000, 1)
            log.info("positions_validated", duration_ms=duration_ms, **counts)
    return dict(counts)
