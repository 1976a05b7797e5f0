"""`tunewright keys …`: API keys of the data folder, while no server runs on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tunewright.jobs.store import Store

HomeOption = Annotated[Path | None, typer.Option("--home", help="The data folder.", show_default="~/.tunewright")]

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def keys() -> None:
    """Make, list and revoke API keys.

    Stop the server first: it is the only one that may write its database.
    """


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="What the key is for.")] = "command line", home: HomeOption = None
) -> None:
    """Make a key and print it. It cannot be shown again."""
    with open_store(home) as store:
        plain, _ = store.add_key(name)
    print(plain)


@app.command("list")
def list_keys(home: HomeOption = None) -> None:
    """List the keys by id, without the keys themselves."""
    with open_store(home) as store:
        rows = store.list_keys()
    if not rows:
        print("No keys yet. `tunewright keys new` makes one.")
    for row in rows:
        state = "revoked" if row.revoked_at else row.kind
        made = datetime.fromtimestamp(row.created_at).strftime("%Y-%m-%d %H:%M")
        print(f"{row.id}\t{row.hint}\t{state}\t{made}\t{row.name}")


@app.command()
def revoke(key: Annotated[str, typer.Argument(help="The id that `keys list` shows.")], home: HomeOption = None) -> None:
    """Switch a key off for good."""
    from tunewright.core.errors import NotFound, did_you_mean

    with open_store(home) as store:
        if not store.revoke_key(key):
            known = [row.id for row in store.list_keys() if not row.revoked_at]
            raise NotFound(f"There is no valid key with the id '{key}'.{did_you_mean(key, known)}")
    print(f"The key {key} no longer works.")


@contextmanager
def open_store(home: Path | None) -> Iterator[Store]:
    """The job store, for a moment. Raises Busy while a server uses the data folder."""
    from tunewright.core.home import find_home
    from tunewright.jobs.store import Store

    store = Store.open(find_home(home))
    try:
        yield store
    finally:
        store.close()
