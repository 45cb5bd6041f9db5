"""timm's hub of weights where a network reaches it, its cache at once where none does."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

SECONDS = 3.0  # that a connection may take; the hub's own client would try again for a minute and a half


@contextlib.contextmanager
def hub_or_cache() -> Iterator[bool]:
    """Offline the hub's client looks into its cache alone; gives whether the hub answers."""
    online = reachable()
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not online
    try:
        yield online
    finally:
        constants.HF_HUB_OFFLINE = before


def reachable() -> bool:
    """Whether the hub, or the proxy on the way to it, takes a connection; not where HF_HUB_OFFLINE is set."""
    if constants.HF_HUB_OFFLINE:
        return False
    hub = urlsplit(constants.ENDPOINT)
    proxy = getproxies().get(hub.scheme)
    to = hub if proxy is None else urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = to.port or {"https": 443}.get(to.scheme, 80)
    try:
        with socket.create_connection((to.hostname or "", port), SECONDS):
            return True
    except OSError:
        return False
