"""Job secrets: ciphertext under a key of the deployment's, never clear text in Redis."""

from __future__ import annotations

__all__ = ["SecretBox"]

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from spider_sdk.errors import FleetError
from spider_worker.settings import FleetSettings

KEY_BYTES = 32
NONCE_BYTES = 12


class SecretBox:
    """Seals with AES-256-GCM and authenticates with HMAC-SHA256, each under a key derived
    from the deployment's one. The key outlives a restart: it is a setting or a file."""

    def __init__(self, master: bytes) -> None:
        if len(master) != KEY_BYTES:
            raise FleetError(f"the secret key must be {KEY_BYTES} bytes, not {len(master)}")
        self._seal = AESGCM(hmac.digest(master, b"spider/job-secrets", "sha256"))
        self._master = master

    @classmethod
    def from_settings(cls, settings: FleetSettings) -> SecretBox:
        """Read the key, or make the key file (mode 600) where there is none yet."""
        if settings.secret_key:
            try:
                return cls(base64.b64decode(settings.secret_key, validate=True))
            except binascii.Error as error:
                raise FleetError("SPIDER_SECRET_KEY is not base64 of 32 bytes") from error
        path = settings.secret_key_file
        if not path.exists():
            _create_key(path)
        return cls(path.read_bytes())

    def seal(self, job_id: str, values: Mapping[str, str]) -> bytes:
        """Encrypt ``values``; empty bytes for none. The job's id is bound to the text."""
        if not values:
            return b""
        nonce = os.urandom(NONCE_BYTES)
        text = json.dumps(dict(values)).encode()
        return nonce + self._seal.encrypt(nonce, text, job_id.encode())

    def open(self, job_id: str, sealed: bytes | None) -> dict[str, str]:
        """The values again. Raises FleetError where key or text is another."""
        if not sealed:
            return {}
        try:
            text = self._seal.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], job_id.encode())
        except InvalidTag as error:
            raise FleetError(
                f"the secrets of job {job_id} do not open with this worker's secret key: API and "
                "workers must share SPIDER_SECRET_KEY or SPIDER_SECRET_KEY_FILE"
            ) from error
        values: dict[str, str] = json.loads(text)
        return values

    def mac(self, purpose: bytes, data: bytes) -> bytes:
        """HMAC-SHA256 of ``data`` under a key derived for ``purpose``."""
        derived = hmac.digest(self._master, b"spider/" + purpose, hashlib.sha256)
        return hmac.digest(derived, data, hashlib.sha256)


def _create_key(path: Path) -> None:
    """Make the file whole under another name first: a second process never reads half a key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass  # another process was first; its key is the deployment's
    finally:
        temporary.unlink()
