"""``spider keys``: who may use the API. Run it where the fleet's Redis and secret key are."""

from __future__ import annotations

__all__ = ["keys"]

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from spider_sdk import settings
from spider_sdk.cli.options import pass_state
from spider_sdk.cli.state import State, json_option
from spider_sdk.errors import UsageError

if TYPE_CHECKING:
    from spider_worker.fleet.keys import ApiKeys


@click.group()
def keys() -> None:
    """Create, list and revoke API keys.

    Keys are kept as hashes in the fleet's Redis (SPIDER_REDIS_URL, SPIDER_SECRET_KEY or
    SPIDER_SECRET_KEY_FILE).
    """


@keys.command()
@click.option("--owner", required=True, help="Whose jobs the key may see.")
@click.option("--label", help="A note to tell this key from others.")
@json_option
@pass_state
def create(state: State, owner: str, label: str | None) -> None:
    """Make a key and print it, this once."""
    with _opened(state) as store:
        key_id, token = store.create(owner, label)
    if state.json:
        state.emit({"id": key_id, "owner": owner, "label": label, "key": token})
        return
    state.say(token)
    state.note(f"Key {key_id} of {owner}. It cannot be shown again.")


@keys.command("list")
@json_option
@pass_state
def list_keys(state: State) -> None:
    """List the keys that let somebody in; never the keys themselves."""
    with _opened(state) as store:
        found = store.list()
    if state.json:
        for key in found:
            document = dataclasses.asdict(key)
            state.emit({"id": document.pop("key_id"), **document})
        return
    if not found:
        state.note("no keys")
    for key in found:
        state.say(f"{key.key_id}  {key.created_at}  {key.owner}  {key.label or ''}".rstrip())


@keys.command()
@click.argument("key_id", metavar="ID")
@json_option
@pass_state
def revoke(state: State, key_id: str) -> None:
    """Let a key in no more, from its next request on."""
    if key_id.startswith("sk_"):
        raise UsageError("give the key's id (the part between the underscores), not the key")
    with _opened(state) as store:
        revoked = store.revoke(key_id)
    if not revoked:
        raise UsageError(f"there is no key {key_id}; `spider keys list` shows them")
    if state.json:
        state.emit({"id": key_id, "revoked": True})
    state.say(f"key {key_id} is revoked")


@contextlib.contextmanager
def _opened(state: State) -> Iterator[ApiKeys]:
    # Here, not above: redis and cryptography take time that `spider keys --help` can do without.
    from spider_worker.fleet.connection import connect
    from spider_worker.fleet.keys import ApiKeys
    from spider_worker.fleet.secret_box import SecretBox
    from spider_worker.settings import FleetSettings

    fleet = settings.load(FleetSettings)
    made = not fleet.secret_key and not fleet.secret_key_file.exists()
    client = connect(fleet.redis_url)
    try:
        store = ApiKeys(client, SecretBox.from_settings(fleet))
        if made:  # in the wrong folder, its keys would let nobody in
            path = fleet.secret_key_file.absolute()
            state.note(f"made a new secret key, {path}: the API and the workers must use it too")
        yield store
    finally:
        client.close()
