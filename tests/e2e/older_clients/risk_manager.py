"""A risk manager, as one was written for the older position manager: reads the portfolio's exposure.

Knows the contract and nothing of `positions`. It prints what it believes as a line of JSON whenever that
changes: the exposures, or "unavailable", with which it lets nobody trade.

    python risk_manager.py ADDRESS KEY
"""

import json
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import uuid4

TIMEOUT_S = 5
PAUSE_S = 0.02


def number(value: Any) -> str:
    """Return a decimal that was sent as a plain string."""
    if not isinstance(value, str) or "E" in value.upper():
        raise TypeError(f"not a decimal as a plain string: {value!r}")
    return str(Decimal(value))


def exposure(address: str, key: str) -> Any:
    """Return the exposures, or that they cannot be told."""
    trace_id = f"risk-manager-{uuid4()}"
    request = urllib.request.Request(
        f"{address}/api/v1/portfolio/exposure", headers={"X-API-Key": key, "X-Trace-Id": trace_id}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            answered, body = response.headers["X-Trace-Id"], json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 503:
                raise
            if int(error.headers["Retry-After"]) < 1:
                raise ValueError("no time to try again after") from None
            problem = json.load(error)
            if not problem["error_code"] or not problem["message"] or problem["trace_id"] != trace_id:
                raise ValueError(f"not as the contract says: {problem}") from None
        return "unavailable"
    except OSError:
        return "unavailable"
    if answered != trace_id:
        raise ValueError("an answer to another question")
    if not body["calculated_at"].endswith("Z"):
        raise ValueError(f"not UTC: {body['calculated_at']}")
    datetime.fromisoformat(body["calculated_at"])
    return {
        "total": number(body["total_exposure_usdt"]),
        "net": number(body["net_exposure_usdt"]),
        # Null is no zero: what has no price is not known.
        "by_asset": {
            asset: None if each["exposure"] is None else number(each["exposure"])
            for asset, each in body["by_asset"].items()
        },
        "limit_exceeded": body["limit_exceeded"] is True,
    }


def main(address: str, key: str) -> None:
    """Ask for ever."""
    believed: Any = None
    while True:
        found = exposure(address, key)
        if found != believed:
            believed = found
            print(json.dumps({"of": "exposure", "belief": found}), flush=True)  # noqa: T201 - its output
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
