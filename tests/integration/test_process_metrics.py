"""What workers, beat and relay tell Prometheus, each at a port of its own."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from positions import metrics
from tests.integration.processes import Process, environment, relay, worker
from tests.integration.support import EXECUTION_QUEUE, channel_of, execution, publish
from tests.services import Port, wait_until

Figures = dict[str, float]


@pytest.fixture
def port() -> Iterator[int]:
    with closing(Port()) as reserved:
        yield reserved.number
    # Of a worker that was killed.
    shutil.rmtree(metrics.folder_for(reserved.number), ignore_errors=True)


def scrape(port: int) -> Figures:
    """Return each sample by its name and its labels as they are in queries, without `positions_`."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation and family.type != "unknown" for family in families)
    return {
        f"{sample.name.removeprefix('positions_')}"
        + (f"{{{','.join(sample.labels.values())}}}" if sample.labels else ""): sample.value
        for family in families
        for sample in family.samples
    }


def test_what_the_processes_of_a_pool_count_is_one_figure(
    database_url: str, broker_url: str, redis_url: str, tmp_path: Path, port: int
) -> None:
    env = environment(database_url, broker_url, redis_url, metrics_port=str(port), batch_size="1")
    with worker(env, tmp_path, "-c", "2") as running:
        assert scrape(port)["events_total{applied}"] == 0
        messages = [execution("BTCUSDT", "Buy", "1", "100", number=number) for number in range(40)]
        publish(broker_url, [(EXECUTION_QUEUE, message) for message in (*messages, messages[0])])
        publish(broker_url, [(EXECUTION_QUEUE, b"{")])
        assert wait_until(lambda: scrape(port)["events_total{quarantined}"] == 1, limit_s=30)
        assert wait_until(lambda: scrape(port)["events_total{applied}"] == 40, limit_s=30)
        figures = scrape(port)
        assert figures["events_total{duplicate}"] == 1
        assert figures["events_decoded_total{trade}"] == 41
        assert figures["batch_messages_count"] == figures["batch_messages_sum"] == 42
        assert figures["batch_messages_bucket{1.0}"] == 42
        assert figures["commit_duration_seconds_count"] == 42
        assert figures["intake_lag_seconds_count"] == 42
        # They happened in January 2025.
        assert figures["event_lag_seconds_bucket{86400.0}"] == 0
        assert figures["event_lag_seconds_count"] == 41
        assert figures["task_duration_seconds_count{success,positions.apply_events}"] == 42

        folder = metrics.folder_for(port)
        files = {file.name for file in folder.iterdir()}
        assert {"counter_0.db", "counter_1.db"} <= files
        # Whoever comes after a process that was killed counts on where that one was.
        before = running.children
        os.kill(before[0], signal.SIGKILL)
        assert wait_until(
            lambda: len(set(running.children) - set(before)) == 1 and len(running.children) == len(before),
            limit_s=30,
        )
        more = [execution("ETHUSDT", "Buy", "1", "100", number=number) for number in range(40)]
        publish(broker_url, [(EXECUTION_QUEUE, message) for message in more])
        assert wait_until(lambda: scrape(port)["events_total{applied}"] == 80, limit_s=30)
        assert {file.name for file in folder.iterdir()} == files
        assert running.terminate() == 0
    assert not folder.exists()


def test_a_port_that_is_taken_keeps_no_worker_from_its_work(
    database_url: str, broker_url: str, redis_url: str, tmp_path: Path, port: int
) -> None:
    env = environment(database_url, broker_url, redis_url, metrics_port=str(port))
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with worker(env, first, "-n", "first@%h"):
        publish(broker_url, [(EXECUTION_QUEUE, execution("BTCUSDT", "Buy", "1", "100"))])
        assert wait_until(lambda: scrape(port)["events_total{applied}"] == 1, limit_s=30)
        with worker(env, second, "-n", "second@%h") as other:
            other.await_log("metrics_not_served")
            # The figures of the first are its own, still.
            assert scrape(port)["events_total{applied}"] == 1


def test_the_relay_counts_what_the_broker_confirmed_and_refused(
    database_url: str, broker_url: str, redis_url: str, tmp_path: Path, port: int
) -> None:
    env = environment(database_url, broker_url, redis_url)
    publish_from = {**env, "POSITION_MANAGER_METRICS_PORT": str(port)}
    with worker(env, tmp_path), relay(publish_from, tmp_path):
        # Somebody has deleted a queue that the relay found when it began.
        with closing(channel_of(broker_url)) as connection, closing(connection.channel()) as channel:
            channel.queue_delete("position-manager.position_updated")
        publish(broker_url, [(EXECUTION_QUEUE, execution("BTCUSDT", "Buy", "1", "100"))])
        assert wait_until(lambda: scrape(port)["published_messages_total{confirmed}"] == 1, limit_s=30)
        figures = scrape(port)
        assert figures["published_messages_total{refused}"] >= 1
        assert figures["relay_interruptions_total"] >= 1
        assert figures["relay_polls_total"] > figures["publish_lag_seconds_count"] >= 1


def test_beat_counts_what_it_sends(
    database_url: str, broker_url: str, redis_url: str, tmp_path: Path, port: int
) -> None:
    env = environment(
        database_url, broker_url, redis_url, metrics_port=str(port), portfolio_update_interval="0.2"
    )
    arguments = ["celery", "-A", "celery_app", "beat", "--pidfile=", "-s", str(tmp_path / "schedule")]
    beat = Process(arguments, env, tmp_path / "beat.log")
    try:
        beat.await_log("metrics_served")
        series = "scheduled_tasks_total{positions.publish_portfolio}"
        assert wait_until(lambda: scrape(port).get(series, 0) >= 2, limit_s=30)
    finally:
        beat.kill()
