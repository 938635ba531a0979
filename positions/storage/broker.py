"""Connections to the broker: RabbitMQ, or Redis through kombu in the embedded default."""

from typing import Any

import structlog
from kombu import Connection

log = structlog.get_logger(__name__)

CONNECT_S = 5.0
INTAKE_QUEUE = "position-manager.intake"
"""Each worker's intake consumes it and nobody publishes to it: its consumers are our workers, which is how
health tells the consumers of a foreign queue that are ours from those that are not."""


def is_redis(url: str) -> bool:
    """Tell whether the broker at ``url`` is Redis."""
    return url.partition("://")[0] in ("redis", "rediss", "valkey")


def transport_options(url: str) -> dict[str, Any]:
    """Return kombu's transport options for the broker at ``url``."""
    if is_redis(url):
        # What a killed worker held comes back after the visibility timeout, looked for at this pace; a
        # batch that takes longer is delivered twice, which the ledger drops. kombu's default is an hour.
        return {
            "visibility_timeout": 45,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 5,
            "socket_timeout": 15,
            "socket_connect_timeout": CONNECT_S,
            "socket_keepalive": True,
            "health_check_interval": 25,
        }
    # Dead peers are noticed by heartbeat; a write that stalls (a broker under a memory alarm) ends here.
    return {"read_timeout": 30, "write_timeout": 30}


def errors(url: str) -> tuple[type[BaseException], ...]:
    """Return what the client of the broker at ``url`` raises when the broker fails or refuses."""
    connection = connect(url)
    return (*connection.connection_errors, *connection.channel_errors)


def connect(url: str) -> Connection:
    """Return a connection to the broker, opened on first use; its errors are kombu's own."""
    return Connection(
        url,
        heartbeat=0 if is_redis(url) else 10,
        connect_timeout=CONNECT_S,
        transport_options=transport_options(url),
    )


def ensure_queue(connection: Any, queue: str) -> None:
    """Declare ``queue``, plain and durable, only if it is missing.

    Its owner, or an operator, may have declared it with arguments of his own, as a quorum queue or with
    limits: to declare it again without them would be an error of the channel.
    """
    try:
        with connection.channel() as channel:
            channel.queue_declare(queue=queue, passive=True)
    except connection.channel_errors:
        with connection.channel() as channel:
            channel.queue_declare(queue=queue, durable=True, auto_delete=False)
        log.info("queue_declared", queue=queue)
