"""The workers' root with two faults: a message about KILLER kills the process that decodes it.

One about ASSASSIN kills its whole worker, as a machine that runs out of memory may.
"""

import os
import signal
from typing import Any

from celery_app import app
from positions.messages import inbound

_decode = inbound.decode


def _decode_or_die(delivery: inbound.Delivery, **limits: Any) -> inbound.Decoded:
    if b"ASSASSIN" in delivery.body:
        os.killpg(0, signal.SIGKILL)
    if b"KILLER" in delivery.body:
        os.kill(os.getpid(), signal.SIGKILL)
    return _decode(delivery, **limits)


inbound.decode = _decode_or_die

__all__ = ["app"]
