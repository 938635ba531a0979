"""The API against its own description: whatever is sent, what comes back is as described."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import Service
from tests.integration.api import KEY
from tests.integration.support import EXECUTION_QUEUE, POSITION_QUEUE, execution, publish


def test_every_answer_is_as_described(service: Service, tmp_path: Path) -> None:
    price = {"event_type": "position", "data": {"symbol": "BTCUSDT", "markPrice": "50000"}, "trace_id": "t"}
    publish(
        service.broker,
        [
            (EXECUTION_QUEUE, execution("BTCUSDT", "Buy", "1", "49000")),
            (EXECUTION_QUEUE, b"no JSON"),
            (POSITION_QUEUE, price),
        ],
    )
    service.position("BTCUSDT", size="1", current_price="50000")
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "schemathesis.cli", "run", f"{service.address}/openapi.json"),
            *("--header", f"X-API-Key: {KEY}"),
            *("--checks", "all", "--max-examples", "25", "--continue-on-failure", "--no-color"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "no failures" not in done.stdout.lower() or "0 generated" not in done.stdout
