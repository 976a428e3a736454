"""Models and adapters by hub id: from the local cache, or through huggingface_hub if installed.

What somebody names (`org/name`, `hf://org/name@revision/sub`) may be downloaded, if the extra `hub`
is installed and HF_HUB_OFFLINE is not set. What a file names is only looked up in the cache.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import NotFoundError
from adapterkit.storage import alike, readable

if TYPE_CHECKING:
    from collections.abc import Iterator

# The hub's own names are shorter; longer ones are the name of no folder of the cache.
_WORD = r"\w[\w.-]{0,95}"
_ID = re.compile(
    rf"^(?:hf://)?(?P<name>{_WORD}/{_WORD})(?:@(?P<revision>[\w.-]{{1,255}}))?"
    r"(?:/(?P<inside>.+))?$",
    re.ASCII,
)
_ADAPTER_FILES = ("*.json", "*.safetensors", "*.bin", "*.gguf", "*.npz", "*.pt")
_BASE_FILES = ("config.json", "*.index.json")


@dataclass(frozen=True, slots=True)
class HubReference:
    """A hub id taken apart.

    Attributes:
        name: `org/name`.
        revision: branch, tag or commit; None for the default.
        inside: path in the repository; empty for all of it.
    """

    name: str
    revision: str | None = None
    inside: str = ""


def parse(reference: str) -> HubReference | None:
    """Read `org/name` or `hf://org/name[@revision][/path]`; None for anything else."""
    match = _ID.match(reference)
    if match is None or (match["inside"] and not reference.startswith("hf://")):
        return None
    return HubReference(match["name"], match["revision"], match["inside"] or "")


def cached(reference: HubReference) -> Iterator[Path]:
    """Yield the snapshots of a repository in the local cache, the newest known one first."""
    folder = cache_folder() / f"models--{reference.name.replace('/', '--')}"
    named = folder / "refs" / (reference.revision or "main")
    if named.is_file():
        yield folder / "snapshots" / named.read_text(encoding="utf-8").strip()
    snapshots = folder / "snapshots"
    if snapshots.is_dir() and reference.revision is None:
        yield from sorted(snapshots.iterdir())
    elif reference.revision and (snapshots / reference.revision).is_dir():
        yield snapshots / reference.revision


def cached_names() -> Iterator[str]:
    """Yield the repositories of models in the local cache, `org/name`, in order."""
    prefix = "models--"
    folder = cache_folder()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(prefix):
            yield path.name.removeprefix(prefix).replace("--", "/", 1)


def located(source: Path | str) -> Path:
    """Return the path of an adapter: itself, or where a hub id lies in the cache.

    Raises:
        NotFoundError: if a hub id is neither in the cache nor can be downloaded.
        FormatError: if the operating system will not say what is there.
    """
    path = Path(source)
    with readable(path):
        reference = None if path.exists() else parse(str(source))
    if reference is None:
        return path
    for snapshot in cached(reference):
        if (snapshot / reference.inside).exists():
            return snapshot / reference.inside
    meant = alike(path)
    if meant:
        raise NotFoundError(f"no such file or directory{meant}", path=path)
    return _download(reference, _ADAPTER_FILES) / reference.inside


def downloaded_base(reference: HubReference) -> Path:
    """Return a snapshot with the config of a base model; weights are not fetched.

    Raises:
        NotFoundError: if it cannot be downloaded.
    """
    return _download(reference, _BASE_FILES)


def _download(reference: HubReference, patterns: tuple[str, ...]) -> Path:
    hint = "no such file or directory, and not in the local hub cache"
    try:
        client = import_module("huggingface_hub")
    except ImportError:
        raise NotFoundError(
            f"{hint}; pip install huggingface_hub to download it", path=reference.name
        ) from None
    if os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}:
        raise NotFoundError(f"{hint}; HF_HUB_OFFLINE is set", path=reference.name)
    try:
        found = client.snapshot_download(
            reference.name, revision=reference.revision, allow_patterns=list(patterns)
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotFoundError(f"{hint}; the hub says: {reason}", path=reference.name) from error
    return Path(found)


def cache_folder() -> Path:
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(home) / "hub"
