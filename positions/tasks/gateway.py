"""The subscription to positions at the gateway, made sure of when a worker starts."""

import time
from collections.abc import Callable

import requests
import structlog

from positions.settings import Settings

log = structlog.get_logger(__name__)

CONNECT_S, READ_S = 3.0, 5.0
WAIT_FIRST_S, WAIT_MAX_S = 1.0, 60.0


def subscribe(settings: Settings, *, wait: Callable[[float], object] = time.sleep) -> None:
    """Ask the gateway to publish positions, again and again until it says that it does.

    Waits 1 s after the first failure, twice as long after each further one, at most a minute. Returns at once
    where no gateway is named, or no key for it.
    """
    if settings.ws_gateway_url is None or settings.ws_gateway_api_key is None:
        return
    url = settings.ws_gateway_url.rstrip("/") + "/api/v1/subscriptions"
    wait_s = WAIT_FIRST_S
    while failure := _failure(url, settings.ws_gateway_api_key.get_secret_value(), settings.service_name):
        log.warning("gateway_not_subscribed", url=url, reason=failure, wait_s=wait_s)
        wait(wait_s)
        wait_s = min(wait_s * 2, WAIT_MAX_S)
    log.info("gateway_subscribed", url=url)


def _failure(url: str, key: str, service: str) -> str | None:
    """Return why the gateway did not take the subscription; None when it did, or has it."""
    try:
        with requests.post(
            url,
            json={"channel_type": "position", "requesting_service": service},
            headers={"X-API-Key": key},
            timeout=(CONNECT_S, READ_S),
            allow_redirects=False,  # the key is for this host
            stream=True,  # what else it answers is not of interest, however long
        ) as response:
            status = response.status_code
    except (requests.RequestException, ValueError) as error:
        return type(error).__name__  # its text may have the key
    return None if 200 <= status < 300 or status == requests.codes.conflict else f"HTTP {status}"
