"""The one importer of the ``datasets`` library: load, and put its errors into our words."""

from __future__ import annotations

__all__ = ["DatasetSpec", "hub_errors", "load"]

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spider_sdk.errors import AuthError, FatalJobError, PipelineError

#: Bytes of JSON that are parsed at once. The library's 10 MiB would make the memory of a small
#: and of a large file differ by a hundred megabytes; the speed is the same.
JSON_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """What to load. ``path`` is a Hub id, a folder, or a builder's name (``json``) where
    ``data_files`` holds local paths by split. ``shown`` is what messages call it."""

    path: str
    shown: str
    config_name: str | None = None
    revision: str | None = None
    token: str | None = None
    data_files: Mapping[str, Sequence[str]] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load(spec: DatasetSpec, *, split: str, streaming: bool) -> Any:
    """A Dataset or an IterableDataset that hands out Arrow tables.

    Blocking; without ``streaming`` the data is downloaded and converted into the cache of
    the library (HF_HOME) and mapped from there. Raises AuthError, FatalJobError; PipelineError
    for what another attempt may mend.
    """
    with hub_errors(spec):
        import datasets
        from huggingface_hub.utils.tqdm import disable_progress_bars

        datasets.disable_progress_bars()
        disable_progress_bars()
        given: dict[str, Any] = {"revision": spec.revision} if spec.data_files is None else {}
        if spec.path == "json":
            given["chunksize"] = JSON_CHUNK
        if spec.data_files is not None:
            given["data_files"] = {name: list(paths) for name, paths in spec.data_files.items()}
        loaded = datasets.load_dataset(
            spec.path,
            spec.config_name,
            split=split,
            streaming=streaming,
            # False, not None: without a token of the job's own, the worker's login is not lent.
            token=spec.token or False,
            **{**given, **spec.options},
        )
        return loaded.with_format("arrow")


@contextlib.contextmanager
def hub_errors(spec: DatasetSpec) -> Iterator[None]:
    """Whatever the library raises, as one of our errors that says what to do."""
    try:
        yield
    except PipelineError:
        raise
    except ImportError as error:
        raise FatalJobError(f"source.dataset: {spec.shown} needs a package: {error}") from error
    except Exception as error:  # the boundary to the library: its errors have many parents
        raise _translate(error, spec) from error


def _translate(error: Exception, spec: DatasetSpec) -> PipelineError:
    import httpx
    from datasets import exceptions
    from huggingface_hub import constants, errors

    chain = _chain(error)
    where = f"source.dataset: {spec.shown}"
    if _any(chain, errors.GatedRepoError) or "gated dataset" in str(error):
        return AuthError(
            f"{where} is gated: ask for access on its page with the account whose token "
            "HF_TOKEN holds, and forward that variable (--env HF_TOKEN)"
        )
    if revision := _any(chain, errors.RevisionNotFoundError):
        return FatalJobError(f"{where} has no revision {spec.revision!r}: {_first_line(revision)}")
    if http := _any(chain, errors.HfHubHTTPError):
        status = getattr(getattr(http, "response", None), "status_code", None)
        if status in (401, 403) and not isinstance(http, errors.RepositoryNotFoundError):
            return AuthError(f"{where}: the Hub refused HF_TOKEN ({status}): {_first_line(http)}")
        if status == 429 or (status is not None and status >= 500):
            return PipelineError(f"{where}: the Hub answered {status}: {_first_line(http)}")
    if constants.HF_HUB_OFFLINE and _any(
        chain, ConnectionError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError
    ):
        return FatalJobError(
            f"{where} is not in this worker's cache (HF_HOME) and HF_HUB_OFFLINE is set"
        )
    if _any(chain, exceptions.DatasetNotFoundError, errors.RepositoryNotFoundError):
        known = "that HF_TOKEN may not see" if spec.token else "(then forward HF_TOKEN)"
        return FatalJobError(
            f"{where} does not exist on the Hub, or is private {known}: {_first_line(error)}"
        )
    if _any(chain, ConnectionError, TimeoutError, httpx.TransportError):
        return PipelineError(f"{where} could not be read for now: {_first_line(error)}")
    if isinstance(error, exceptions.DatasetGenerationError):
        return FatalJobError(f"{where} cannot be read: {_first_line(chain[-1])}")
    if isinstance(error, StopIteration):  # what the library makes of files without a row
        return FatalJobError(f"{where} holds no rows")
    if isinstance(error, ValueError | TypeError | KeyError | FileNotFoundError):
        # Unknown splits (with those that there are), configs and options, unreadable files.
        return FatalJobError(f"{where} cannot be loaded: {_text(error)}")
    return PipelineError(f"{where}: {type(error).__name__}: {_text(error)}")


def _chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links


def _any(chain: Sequence[BaseException], *kinds: type[BaseException]) -> BaseException | None:
    return next((link for link in chain if isinstance(link, kinds)), None)


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:1_000] or type(error).__name__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:500] if lines else type(error).__name__
