"""Messages that were begun and not seen to end: what counts the attempts of one that ends its worker.

Only messages that were delivered before are in it, and only until they are done: the rows that stay are those
of messages whose process was lost with them.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import Connection, delete

from positions.storage.tables import attempts

# Sorted, as all that is locked.
_BEGUN = """
    INSERT INTO attempts AS a (digest, queue, alone, first_begun_at, last_begun_at)
    SELECT v.digest, v.queue, %(alone)s, %(now)s, %(now)s
    FROM unnest(%(digest)s::text[], %(queue)s::text[]) AS v (digest, queue)
    ORDER BY v.digest
    ON CONFLICT (digest) DO UPDATE
    SET alone = a.alone + excluded.alone, last_begun_at = excluded.last_begun_at
    RETURNING digest, alone, a.xmax <> 0 AS known
"""
_DONE = """
    DELETE FROM attempts WHERE digest IN (
        SELECT digest FROM attempts
        WHERE digest = ANY(%(digest)s::text[])
        ORDER BY digest FOR UPDATE
    )
"""


def begun(
    connection: Connection, queues: Mapping[str, str], *, alone: bool, now: datetime
) -> dict[str, tuple[int, bool]]:
    """Note that messages are begun, to be committed before they are.

    Args:
        connection: its transaction must end before the messages are applied.
        queues: queue of each message, by digest.
        alone: whether they are few or one, apart from others, and nothing else is done meanwhile.
        now: the time.

    Returns:
        For each digest how often it was begun apart, this time included, and whether it was begun before.
    """
    rows = connection.exec_driver_sql(
        _BEGUN, {"digest": list(queues), "queue": list(queues.values()), "alone": int(alone), "now": now}
    )
    return {row.digest: (row.alone, row.known) for row in rows}


def done(connection: Connection, digests: Sequence[str]) -> None:
    """Forget messages whose process lived to tell what became of them."""
    connection.exec_driver_sql(_DONE, {"digest": list(digests)})


def forget(connection: Connection, *, before: datetime) -> None:
    """Delete rows of messages that were last begun ``before`` and did not come again."""
    connection.execute(delete(attempts).where(attempts.c.last_begun_at < before))
