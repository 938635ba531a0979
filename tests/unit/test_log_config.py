"""What a log line looks like, and what must never stand in one."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import structlog

from positions import log_config, settings


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def _configure(form: str = "json") -> None:
    log_config.configure(
        settings.load({"POSITION_MANAGER_LOG_FORMAT": form, "POSITION_MANAGER_LOG_LEVEL": "INFO"})
    )


def _lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def _fail(reason: str) -> None:
    local = "of nobody's concern"
    raise ValueError(reason[: len(reason) + len(local)])


def test_our_events_and_the_libraries_share_one_format(capsys: pytest.CaptureFixture[str]) -> None:
    _configure()
    structlog.contextvars.bind_contextvars(trace_id="t-1")
    structlog.get_logger("ours").info("position_folded", asset="BTCUSDT", size=Decimal("1.50"))
    logging.getLogger("celery.worker").info("Connected to %s", "broker")

    ours, theirs = _lines(capsys)
    assert ours["event"] == "position_folded"
    assert (ours["asset"], ours["size"]) == ("BTCUSDT", "1.50")
    assert theirs["event"] == "Connected to broker"
    for line in (ours, theirs):
        assert line["trace_id"] == "t-1"
        assert line["level"] == "info"
        assert line["service"] == "position-manager"
        assert line["timestamp"].endswith("Z")


def test_gunicorn_uses_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("gunicorn.error")
    log.propagate = False
    log.addHandler(logging.StreamHandler())
    _configure()
    log.info("Listening")
    assert [line["event"] for line in _lines(capsys)] == ["Listening"]


def test_noise_of_libraries_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    _configure()
    logging.getLogger("kombu.connection").info("chatter")
    logging.getLogger("kombu.connection").warning("trouble")
    assert [line["event"] for line in _lines(capsys)] == ["trouble"]


def test_exception_is_structured_and_shows_no_variables(capsys: pytest.CaptureFixture[str]) -> None:
    _configure()
    try:
        _fail("no connection to postgresql://me:hunter2@db/positions")
    except ValueError:
        structlog.get_logger().exception("task_failed")
    [line] = _lines(capsys)
    [error] = line["exception"]
    assert error["exc_type"] == "ValueError"
    assert error["exc_value"] == "no connection to postgresql://[redacted]@db/positions"
    assert error["frames"][-1]["name"] == "_fail"
    assert "of nobody's concern" not in json.dumps(line)


@pytest.mark.parametrize("form", ["json", "console"])
def test_no_secret_is_written(capsys: pytest.CaptureFixture[str], form: str) -> None:
    _configure(form)
    structlog.get_logger().info(
        "started",
        api_key="hunter2",
        POSTGRES_PASSWORD="hunter2",
        broker="amqp://guest:hunter2@ho:st@rabbit:5672//",
        cache=["redis://:hunter2@cache/0"],
        headers={"X-API-Key": "hunter2", "Authorization": "Bearer hunter2"},
        text="X-Api-Key: hunter2, password=hunter2&asset=BTCUSDT, authorization='Bearer hunter2'",
    )
    logging.getLogger("celery").warning("retrying %s", "redis://:hunter2@cache/0")
    try:
        _fail("password=hunter2")
    except ValueError:
        structlog.get_logger().exception("failed")
    written = capsys.readouterr().err
    assert "hunter2" not in written
    assert "ho:st" not in written
    assert "rabbit:5672" in written
    assert "asset=BTCUSDT" in written


def test_full_disk_ends_nothing_that_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115 - how it closes is tested too
    monkeypatch.setattr(sys, "stderr", full)
    _configure()
    try:
        structlog.get_logger("ours").info("position_folded")
        logging.getLogger("celery.worker").info("Connected")
    finally:
        # What it could not write, it tries again.
        with pytest.raises(OSError, match="No space left"):
            full.close()


def test_nothing_else_is_redacted() -> None:
    event = {"event": "x", "key_name": "risk", "password": None, "n": 1.5, "url": "https://host/a?b=c@d"}
    assert log_config.redact(None, "info", dict(event)) == event
