"""API keys: made here, shown once, kept as HMACs.

A token is ``sk_<id>_<secret>``. Redis holds, under the id, the owner and the HMAC-SHA256 of the
whole token under the deployment's key, so that neither a copy of Redis nor the key file alone
lets anybody in.
"""

from __future__ import annotations

__all__ = ["ApiKey", "ApiKeys"]

import dataclasses
import hmac
import re
import secrets
from datetime import UTC, datetime
from typing import Final

from spider_sdk.errors import UsageError
from spider_worker.fleet.connection import Client, fleet_errors
from spider_worker.fleet.names import key
from spider_worker.fleet.secret_box import SecretBox

#: An owner's name becomes part of Redis keys, whose separator is the colon.
_OWNER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
_TOKEN: Final = re.compile(r"sk_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_PURPOSE: Final = b"api-keys"
_NOBODY: Final = bytes(32)
MAX_LABEL: Final = 200


@dataclasses.dataclass(frozen=True)
class ApiKey:
    """A key as it may be shown. ``created_at`` is ISO 8601 in UTC; ``label`` may be None."""

    key_id: str
    owner: str
    label: str | None
    created_at: str


class ApiKeys:
    """Create, list, revoke and check keys. All but ``create`` raise FleetUnavailable alone."""

    def __init__(self, redis: Client, secret_box: SecretBox) -> None:
        self._redis = redis
        self._box = secret_box

    def create(self, owner: str, label: str | None = None) -> tuple[str, str]:
        """A new key of ``owner``'s: (key id, token). The token cannot be had again.

        Raises UsageError for a name that no owner can have, FleetUnavailable.
        """
        if not _OWNER.fullmatch(owner):
            raise UsageError(
                f"{owner!r} is no name for an owner: 1 to 64 letters, digits, '.', '_', '@', '+' "
                "or '-', the first a letter or a digit"
            )
        if label is not None and (len(label) > MAX_LABEL or not label.isprintable()):
            raise UsageError(f"a label has at most {MAX_LABEL} characters, all printable")
        key_id = secrets.token_hex(8)
        token = f"sk_{key_id}_{secrets.token_urlsafe(32)}"
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        fields: dict[str, str | bytes] = {"owner": owner, "mac": self._mac(token), "created": now}
        if label:
            fields["label"] = label
        with fleet_errors():
            pipe = self._redis.pipeline(transaction=True)
            pipe.hset(key("key", key_id), mapping=fields)
            pipe.sadd(key("keys"), key_id)
            pipe.execute()
        return key_id, token

    def list(self) -> list[ApiKey]:
        """Every key that lets somebody in, oldest first."""
        with fleet_errors():
            ids = [member.decode() for member in self._redis.smembers(key("keys"))]
            pipe = self._redis.pipeline(transaction=False)
            for key_id in ids:
                pipe.hmget(key("key", key_id), "owner", "label", "created")
            rows = pipe.execute()
        found = []
        for key_id, (owner, label, created) in zip(ids, rows, strict=True):
            if owner is not None:  # else revoked between the two reads
                text = label.decode() if label is not None else None
                found.append(ApiKey(key_id, owner.decode(), text, created.decode()))
        return sorted(found, key=lambda item: (item.created_at, item.key_id))

    def revoke(self, key_id: str) -> bool:
        """Let this key in no more, from the next request on. False: there is no such key."""
        with fleet_errors():
            pipe = self._redis.pipeline(transaction=True)
            pipe.delete(key("key", key_id))
            pipe.srem(key("keys"), key_id)
            deleted, _ = pipe.execute()
        return bool(deleted)

    def authenticate(self, token: str) -> str | None:
        """The owner whose key this is, None for anything else.

        An unknown id costs the same work as a wrong secret, so that the time of the answer
        tells nothing about which ids exist.
        """
        shaped = _TOKEN.fullmatch(token)
        key_id = shaped.group(1) if shaped else "0" * 16
        with fleet_errors():
            owner, mac = self._redis.hmget(key("key", key_id), "owner", "mac")
        same = hmac.compare_digest(self._mac(token), mac or _NOBODY)
        if not same or shaped is None or owner is None:
            return None
        name: str = owner.decode()
        return name

    def _mac(self, token: str) -> bytes:
        return self._box.mac(_PURPOSE, token.encode("utf-8", "replace"))
