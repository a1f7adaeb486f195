"""Whether the Hugging Face hub is reachable, and where this project caches prepared files."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import getproxies

if TYPE_CHECKING:
    import datasets

_CONNECT_TIMEOUT_S = 3.0


def go_offline_if_unreachable() -> None:
    """Makes the hub libraries use only their caches if no connection can be made.

    Otherwise every look-up retries for up to half a minute. Call it before they are imported, as
    they read the variable once. With a proxy, nothing is checked: that is left to them.
    """
    if "HF_HUB_OFFLINE" in os.environ or getproxies().keys() & {"https", "all"}:
        return
    url = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def load_dataset(name: str, config: str | None, revision: str | None, **options: Any) -> Any:
    """`datasets.load_dataset`.

    Raises:
        OSError: the data set is not available; also replaces the other errors that ``datasets``
            raises, such as when it cannot prepare the files, or is offline with only another
            config of the data set in its cache.
    """
    import datasets

    try:
        return datasets.load_dataset(name, config, revision=revision, **options)
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(str(error)) from error


def data_revision(rows: datasets.Dataset) -> str | None:
    """The hub commit that rows from `load_dataset` belong to; None: unknown.

    ``datasets`` names the folder in its cache after it.
    """
    folders = [Path(file["filename"]).parent.name for file in rows.cache_files]
    is_known = bool(folders) and re.fullmatch("[0-9a-f]{40}", folders[0])
    return folders[0] if is_known else None


def model_revision(name: str, wanted: str | None) -> str | None:
    """The commit of the model that was loaded from the hub or its cache; None: unknown.

    Args:
        wanted: the commit, branch or tag that was asked for.
    """
    from huggingface_hub import try_to_load_from_cache

    # .../snapshots/<commit>/config.json
    file = try_to_load_from_cache(name, "config.json", revision=wanted)
    return Path(file).parent.name if isinstance(file, str) else None


def cache_dir() -> Path:
    """Where converted models and exported data go: $MICROADAM_CACHE, else ~/.cache/microadam."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "microadam"
    return Path(os.environ.get("MICROADAM_CACHE", default))
