"""The API against its own description: whatever is sent, what comes back is as described."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import requests

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
    report = tmp_path / "report.har"
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "schemathesis.cli", "run", f"{service.address}/openapi.json"),
            *("--header", f"X-API-Key: {KEY}"),
            *("--checks", "all", "--max-examples", "25", "--continue-on-failure", "--no-color"),
            *("--report", "har", "--report-har-path", str(report)),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    document = requests.get(f"{service.address}/openapi.json", timeout=10).json()
    entries = json.loads(report.read_text())["log"]["entries"]
    answered = {
        (each["request"]["method"], urlsplit(each["request"]["url"]).path, each["response"]["status"])
        for each in entries
    }

    def statuses(method: str, template: str) -> set[int]:
        path = re.compile(re.sub(r"{.*?}", "[^/]+", template))
        return {status for asked, at, status in answered if asked == method and path.fullmatch(at)}

    for template, operations in document["paths"].items():
        for method in operations:
            found = statuses(method.upper(), template)
            # Whether a message is there and can be applied by now is not for who guesses its number.
            good = {200, 201, 404, 409} if template.endswith("/replay") else {200, 201}
            assert found & good, (method, template, found)
