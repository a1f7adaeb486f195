"""Whether the Hugging Face hub can be reached, and where this project keeps what it prepares."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlparse

_CONNECT_TIMEOUT_S = 3.0


def go_offline_if_unreachable() -> None:
    """Tells the hub libraries to use only their caches where no connection can be made.

    Without it every look-up retries for up to half a minute. Call it before they are imported: they
    read the variable once. A proxy is left to them.
    """
    if "HF_HUB_OFFLINE" in os.environ or os.environ.get(
        "HTTPS_PROXY", os.environ.get("https_proxy")
    ):
        return
    url = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def cache_dir() -> Path:
    """Where converted models and exported data go: $MICROADAM_CACHE, else ~/.cache/microadam."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "microadam"
    return Path(os.environ.get("MICROADAM_CACHE", default))
