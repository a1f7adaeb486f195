"""What tells data apart that a config calls by one name: a checkpoint and a record keep it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def digest(parts: Iterable[bytes]) -> str:
    """Sixteen hex digits that identify the concatenation of all parts."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[:16]
