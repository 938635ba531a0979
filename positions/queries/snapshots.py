"""Snapshots of a position as their readers ask for them."""

from datetime import datetime

from sqlalchemy import Connection

from positions.domain.events import PositionKey
from positions.messages.outbound import SnapshotView
from positions.queries.identity import position_id
from positions.storage.snapshots import listed


def snapshots(
    connection: Connection,
    key: PositionKey,
    *,
    limit: int,
    offset: int = 0,
    from_: datetime | None = None,
    to: datetime | None = None,
) -> tuple[SnapshotView, ...]:
    """Return snapshots of the position, the newest first.

    Args:
        connection: only read from.
        key: which position.
        limit: most to return.
        offset: so many of the newest are left out.
        from_: only of this moment and later.
        to: only of this moment and earlier.

    Raises:
        NotFound: nothing was ever recorded of the position.
    """
    kept = listed(connection, position_id(connection, key), limit=limit, offset=offset, from_=from_, to=to)
    return tuple(
        SnapshotView(
            id=each.id,
            position_id=each.position_id,
            asset=each.key.asset,
            mode=str(each.key.mode),
            snapshot_data=each.data,
            created_at=each.created_at,
        )
        for each in kept
    )
