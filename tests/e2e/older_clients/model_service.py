"""A model service, as one was written for the older position manager: reads positions by asset and mode.

Knows the contract and nothing of `positions`. For each position it prints what it believes as a line of JSON
whenever that changes: figures, null where there is no position, or "unavailable".

    python model_service.py ADDRESS KEY ASSET[:MODE] ...
"""

import json
import sys
import time
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import uuid4

import requests

TIMEOUT_S = 5
PAUSE_S = 0.02
FIGURES = ("size", "average_entry_price", "current_price", "unrealized_pnl", "realized_pnl")


def number(value: Any) -> Decimal | None:
    """Return a decimal that was sent as a plain string."""
    if value is None:
        return None
    if not isinstance(value, str) or "E" in value.upper():
        raise TypeError(f"not a decimal as a plain string: {value!r}")
    return Decimal(value)


def position(session: requests.Session, address: str, asset: str, mode: str | None) -> Any:
    """Return the position's figures, None where there is none, or that it cannot be told."""
    trace_id = f"model-service-{uuid4()}"
    try:
        response = session.get(
            f"{address}/api/v1/positions/{asset}",
            params={"mode": mode} if mode else {},
            headers={"X-Trace-Id": trace_id},
            timeout=TIMEOUT_S,
        )
    except requests.RequestException:
        return "unavailable"
    if response.headers["X-Trace-Id"] != trace_id:
        raise ValueError("an answer to another question")
    if response.status_code == 404:
        return None
    if response.status_code != 200:
        return "unavailable"
    found = response.json()
    if (found["asset"], found["mode"]) != (asset.upper(), mode or "one-way"):
        raise ValueError(f"another position than {asset}, {mode}: {found}")
    if not found["last_updated"].endswith("Z"):
        raise ValueError(f"not UTC: {found['last_updated']}")
    datetime.fromisoformat(found["last_updated"])
    # What its model is fed with has to be numbers wherever there is a price.
    if found["current_price"] is not None:
        float(found["unrealized_pnl_pct"])
        float(found["position_size_norm"])
    int(found["time_held_minutes"])
    return {name: None if (value := number(found[name])) is None else str(value) for name in FIGURES}


def main(address: str, key: str, *wanted: str) -> None:
    """Ask for ever."""
    believed: dict[str, Any] = {}
    with requests.Session() as session:
        session.headers["X-API-Key"] = key
        while True:
            for each in wanted:
                asset, _, mode = each.partition(":")
                found = position(session, address, asset, mode or None)
                if each not in believed or believed[each] != found:
                    believed[each] = found
                    print(json.dumps({"of": each, "belief": found}), flush=True)  # noqa: T201 - its output
            time.sleep(PAUSE_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
