"""From publishing an execution until the API shows it, while others come at a steady rate.

The rate is a share of the highest that is kept up while the neighbours publish: broker and worker share the
cores with it, and what lies in the queues before (`benchmarks.intake`) was published in nobody's time.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from http.client import HTTPConnection
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace

import amqp
from amqp.method_framing import frame_writer

from benchmarks import load
from benchmarks.intake import await_empty
from benchmarks.machine import Machine, Place
from tests.integration.api import KEY, served
from tests.integration.processes import worker
from tests.integration.support import EXECUTION_QUEUE, channel_of, execution

PROBE = "PROBEUSDT"
TICK_S = 0.01
LOOK_S = 0.005


def _paced(url: str, begun: Event, *, rate: float, number: int, assets: int, first: int) -> None:
    """Publish ``number`` executions, ``rate`` a second, evenly, from when ``begun`` is set."""
    bodies = [
        json.dumps(message).encode()
        for _, message in load.messages("executions", number, assets, first=first)
    ]
    with closing(channel_of(url)) as connection, closing(connection.channel()) as channel:
        frames = _recorded(connection, channel, bodies)
        begun.set()
        started, done = time.perf_counter(), 0
        while done < len(frames):
            due = int(min((time.perf_counter() - started) * rate, len(frames)))
            connection.transport.write(b"".join(frames[done:due]))
            done = due
            time.sleep(TICK_S)


def _recorded(connection: amqp.Connection, channel: amqp.Channel, bodies: Sequence[bytes]) -> list[bytes]:
    """Return what is to be sent for each message.

    Made while it is sent, it would take a third of a core from the service: its neighbours have their own.
    """
    frames: list[bytes] = []
    write = connection.frame_writer
    connection.frame_writer = frame_writer(
        connection, SimpleNamespace(write=lambda frame: frames.append(bytes(frame)))
    )
    for body in bodies:
        channel.basic_publish(amqp.Message(body, delivery_mode=2), routing_key=EXECUTION_QUEUE)
    connection.frame_writer = write
    return frames


def _publisher(place: Place, *, rate: float, number: int, assets: int, first: int) -> SpawnProcess:
    """Return a process that has begun to publish."""
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    busy = context.Process(
        target=_paced,
        args=(place.broker, begun),
        kwargs={"rate": rate, "number": number, "assets": assets, "first": first},
        daemon=True,
    )
    busy.start()
    begun.wait()
    return busy


def _warmed(machine: Machine, place: Place, assets: int) -> int:
    """Have each asset's position known, and return how many executions that took."""
    warm = load.published(place.broker, load.messages("executions", 2 * assets, assets))
    await_empty(machine, place)
    return warm


def highest_rate(machine: Machine, *, events: int, assets: int) -> float:
    """Return how many executions a second are applied while they come as fast as the broker takes them."""
    with (
        machine.place() as place,
        tempfile.TemporaryDirectory() as folder,
        worker(place.env, Path(folder)),
    ):
        first = _warmed(machine, place, assets)
        busy = _publisher(place, rate=1e9, number=events, assets=assets, first=first)
        started = time.perf_counter()
        busy.join()
        await_empty(machine, place)
        return events / (time.perf_counter() - started)


def _shown(http: HTTPConnection) -> int:
    http.request("GET", f"/api/v1/positions/{PROBE}", headers={"X-API-Key": KEY})
    answer = http.getresponse()
    body = answer.read()
    return int(json.loads(body)["size"]) if answer.status == 200 else 0


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def measured(machine: Machine, *, rate: float, seconds: float, assets: int) -> dict[str, float]:
    """Return how long probes took to be seen, in ms, with ``rate`` other executions a second meanwhile."""
    with (
        machine.place(rate_limit_default="1000000") as place,
        tempfile.TemporaryDirectory() as folder,
        worker(place.env, Path(folder)),
        served(Path(folder), place.env) as api,
        closing(HTTPConnection("127.0.0.1", api.port)) as http,
        closing(channel_of(place.broker)) as connection,
        closing(connection.channel()) as channel,
    ):
        first = _warmed(machine, place, assets)
        busy = _publisher(place, rate=rate, number=int(rate * seconds), assets=assets, first=first)
        time.sleep(2)  # until it goes evenly
        waits: list[float] = []
        while busy.is_alive():
            number = len(waits) + 1
            message = execution(PROBE, "Buy", "1", "100", number=number)
            started = time.perf_counter()
            channel.basic_publish(
                amqp.Message(json.dumps(message).encode(), delivery_mode=2), routing_key=EXECUTION_QUEUE
            )
            while _shown(http) < number:
                if time.perf_counter() - started > 60:
                    raise SystemExit(f"probe {number} was not seen in a minute")
                time.sleep(LOOK_S)
            waits.append((time.perf_counter() - started) * 1000)
            time.sleep(max(0.0, 0.1 - waits[-1] / 1000))
    return {
        "other events/s": rate,
        "probes": len(waits),
        "p50 ms": _percentile(waits, 0.5),
        "p99 ms": _percentile(waits, 0.99),
        "max ms": max(waits),
    }
