"""Which position a key names."""

from sqlalchemy import Connection, select

from positions.domain.events import PositionKey
from positions.errors import NotFound
from positions.storage.tables import positions


def position_id(connection: Connection, key: PositionKey) -> str:
    """Return the id of the position of ``key``.

    Raises:
        NotFound: nothing was ever recorded of it.
    """
    statement = select(positions.c.id).where(
        positions.c.asset == key.asset, positions.c.mode == str(key.mode)
    )
    found = connection.execute(statement).scalar()
    if found is None:
        raise NotFound(f"There is no {key.mode} position in {key.asset}.")
    return str(found)
