"""``resolved.json`` as bytes: its content under a digest, so that a flipped bit is no other spec.

Apart from what the content means, so that ``status`` can look into it without the mathematics.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

FROZEN = "resolved.json"
_START, _MIDDLE, _END = b'{"sha256": "', b'", "known": ', b"}\n"
_DIGITS = 64


def seal(known: dict[str, Any]) -> bytes:
    """The file's bytes."""
    return _sealed(json.dumps(known, separators=(",", ":")).encode())


def unseal(data: bytes) -> dict[str, Any]:
    """What was sealed; an older flatcensus wrote it without a digest. ValueError if damaged."""
    if not data.startswith(_START):
        return json.loads(data)
    body = data[len(_START) + _DIGITS + len(_MIDDLE) : -len(_END)]
    if _sealed(body) != data:
        raise ValueError("its SHA-256 does not match its content")
    return json.loads(body)


def _sealed(body: bytes) -> bytes:
    digest = hashlib.sha256(body).hexdigest().encode()
    return b"".join((_START, digest, _MIDDLE, body, _END))
