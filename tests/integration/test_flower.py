"""Flower as an operator starts it: behind a password, on this host, with batches and without payloads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.integration.api import ROOT
from tests.integration.processes import Process, environment, worker
from tests.integration.support import EXECUTION_QUEUE, execution, publish
from tests.services import Port, wait_until

AUTH = ("operator", "only-for-the-test")


@pytest.fixture
def env(database_url: str, broker_url: str, redis_url: str) -> dict[str, str]:
    return environment(database_url, broker_url, redis_url)


@pytest.fixture
def flower(env: dict[str, str], tmp_path: Path) -> Iterator[str]:
    with closing(Port()) as port:
        process = Process(
            ["celery", "-A", "celery_app", "flower", f"--port={port.number}"],
            env | {"FLOWER_BASIC_AUTH": ":".join(AUTH)},
            tmp_path / "flower.log",
        )
        address = f"http://127.0.0.1:{port.number}"
        try:
            assert wait_until(lambda: answers(address), limit_s=60), process.log.read_text()
            yield address
        finally:
            process.kill()


def answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/healthcheck", timeout=5).ok
    except requests.ConnectionError:
        return False


def tasks(address: str) -> list[dict[str, Any]]:
    found = requests.get(f"{address}/api/tasks", params={"limit": 1000}, auth=AUTH, timeout=10)
    return [each for each in found.json().values() if each["name"] == "positions.apply_events"]


def test_a_batch_shows_its_size_and_outcome_and_no_payload(
    flower: str, env: dict[str, str], broker_url: str, tmp_path: Path
) -> None:
    with worker(env, tmp_path):
        good = execution("BTCUSDT", "Buy", "0.123456", "45678.9", trace_id="not-for-flower")

        def shown() -> bool:
            # Again until Flower has begun to listen.
            publish(broker_url, [(EXECUTION_QUEUE, good), (EXECUTION_QUEUE, b"{bad")])
            return bool(tasks(flower))

        assert wait_until(shown, limit_s=60)
        seen: list[dict[str, Any]] = []

        def ended() -> bool:
            # Judged below is what was seen here: a batch may be on its way until the worker is killed.
            seen[:] = tasks(flower)
            return all(each["state"] == "SUCCESS" for each in seen) and any(
                "'quarantined'" in each["result"] for each in seen
            )

        assert wait_until(ended, limit_s=60), seen
    assert all(each["args"].endswith(f" {EXECUTION_QUEUE}>") for each in seen), seen
    pages = [requests.get(f"{flower}/{page}", auth=AUTH, timeout=10).text for page in ("tasks", "")]
    details = [requests.get(f"{flower}/task/{each['uuid']}", auth=AUTH, timeout=10).text for each in seen]
    for text in (str(seen), *pages, *details):
        assert "0.123456" not in text
        assert "not-for-flower" not in text
        assert AUTH[1] not in text


def test_nobody_is_let_in_without_the_password(flower: str) -> None:
    for page in ("", "tasks", "api/tasks", "api/workers", "broker"):
        for auth in (None, ("operator", "wrong")):
            assert requests.get(f"{flower}/{page}", auth=auth, timeout=10).status_code == 401


def test_it_does_not_start_without_a_password_nor_listen_to_other_hosts(env: dict[str, str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "celery_app", "flower"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode != 0
    assert "FLOWER_BASIC_AUTH" in ended.stderr
    assert 'address = "127.0.0.1"' in (ROOT / "flowerconfig.py").read_text()
