"""Checkpoints of the ANRGUSC TinyLoRA pack on disk: which one a path means, and is it whole?

`runs/RUN/checkpoints/step_000000005/` holds `adapter_state.pt`, `manifest.json` with the sha256 of
each file, and `COMPLETED`. A `tinylora.json` beside them, or in the run's folder, states what the
pack does not store; adapterkit writes one, with a witness.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from adapterkit.containers.torch_zip import read_torch_zip
from adapterkit.errors import FormatError, NotFoundError, UnsupportedError
from adapterkit.json_file import read_json_object
from adapterkit.storage import readable
from adapterkit.tables import ANY_MAPPING, TEXT, Table, listed, text
from adapterkit.tensor import LazyTensor
from adapterkit.tinylora.settings import SETTINGS_FILE, TinySettings, settings_from
from adapterkit.tinylora.witness import Witness, parse_witnesses

STATE = "adapter_state.pt"
MANIFEST = "manifest.json"
COMPLETED = "COMPLETED"
_SUFFIX = ".v"
_STEP = re.compile(r"step_(\d+)")
_LONGEST_NAME = 255
_POINTER = Path("manifests") / "latest_checkpoint.json"
_UNSEEDED = (
    "its projections were drawn from a generator without a seed of their own and saved nowhere, "
    "so the update cannot be rebuilt; save the merged weights where it was trained"
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that is what its manifest says.

    Attributes:
        state: the file with the vectors.
        metadata: `metadata` of the manifest, or run_meta.json.
        settings: from tinylora.json.
        witnesses: from tinylora.json.
        notes: how it was found, and what could not be verified.
    """

    state: Path
    metadata: Mapping[str, Any]
    settings: TinySettings
    witnesses: Mapping[str, Witness]
    notes: tuple[str, ...]


def is_pack(path: Path) -> bool:
    """Tell whether a path is a checkpoint, a run or a root of the pack, or a state file."""
    if path.is_dir():
        return (path / STATE).is_file() or bool(_runs(path)) or bool(_steps(path))
    try:
        root = read_torch_zip(path).root
    except (FormatError, OSError):
        return False
    if not isinstance(root, dict):
        return False
    names = [str(name) for name in cast("dict[Any, Any]", root)]
    refused = names == ["v"] or "global_v" in names
    return refused or all(name.endswith(_SUFFIX) for name in names)


def find_checkpoint(path: Path, given: str | None) -> Checkpoint:
    """Find and verify the checkpoint that a path means.

    Args:
        path: a checkpoint directory, its state file, a run's directory, or a root with one run.
        given: a settings file named by the user, over the one beside the checkpoint.

    Raises:
        NotFoundError: if there is none, or several runs.
        FormatError: if a manifest is malformed or a file is not what it says.
    """
    notes: list[str] = []
    folder, state = _located(path, notes)
    metadata = _verified(folder, state, notes)
    run = folder.parent.parent
    if not metadata and (run / "run_meta.json").is_file():
        metadata = read_json_object(run / "run_meta.json")
    settings, witnesses = _settings(folder, run, given)
    return Checkpoint(
        state=state, metadata=metadata, settings=settings, witnesses=witnesses, notes=tuple(notes)
    )


def read_vectors(path: Path) -> dict[str, LazyTensor]:
    """Return module -> v of a state file, in its order.

    Raises:
        FormatError: if it holds nothing, or something else than vectors of one length.
        UnsupportedError: if it is of a kind that cannot be rebuilt.
    """
    root = read_torch_zip(path).root
    if not isinstance(root, dict):
        raise FormatError("is no dictionary of vectors", path=path)
    fields = cast("dict[object, object]", root)
    if not fields:
        raise FormatError("holds no tensors; training saved an empty adapter", path=path)
    if list(fields) == ["v"]:
        raise UnsupportedError(f"looks like TinyLoRA-RL-SVD: {_UNSEEDED}", path=path)
    if "global_v" in fields:
        raise UnsupportedError(f"looks like TinyLoRA-Qwen-Coder: {_UNSEEDED}", path=path)
    vectors: dict[str, LazyTensor] = {}
    for name, tensor in fields.items():
        if not isinstance(name, str) or not name.endswith(_SUFFIX) or name == _SUFFIX:
            raise FormatError("is no vector <module>.v", path=path, where=str(name)[:200])
        if not isinstance(tensor, LazyTensor) or len(tensor.shape) != 1 or not tensor.size:
            raise FormatError("is no vector of numbers", path=path, where=name)
        if not tensor.dtype.floating:
            raise FormatError(f"holds {tensor.dtype}, not real numbers", path=path, where=name)
        vectors[name.removesuffix(_SUFFIX)] = tensor
    sizes = {tensor.size for tensor in vectors.values()}
    if len(sizes) > 1:
        raise FormatError(f"its vectors have different lengths {sorted(sizes)}", path=path)
    return vectors


def _located(path: Path, notes: list[str]) -> tuple[Path, Path]:
    """Return the checkpoint's folder and its state file."""
    if path.is_file():
        return path.parent, path
    if (path / STATE).is_file():
        return path, path / STATE
    runs = _runs(path)
    if len(runs) > 1:
        names = ", ".join(run.name for run in runs)
        raise NotFoundError(f"holds several runs ({names}); name one of them", path=path)
    run = runs[0] if runs else path
    steps = _steps(run)
    if not steps:
        raise NotFoundError(f"no checkpoint here: no {STATE}", path=path)
    chosen = _latest(run, steps, notes)
    notes.append(f"read from {chosen.relative_to(path).as_posix()}")
    return chosen, chosen / STATE


def _runs(path: Path) -> list[Path]:
    folder = path / "runs"
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [run for run in found if _steps(run)]


def _steps(run: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first."""
    folder = run / "checkpoints"
    found = list(folder.iterdir()) if folder.is_dir() else []
    steps = [(int(match[1]), step) for step in found if (match := _STEP.fullmatch(step.name))]
    return [step for _, step in sorted(steps, reverse=True) if (step / STATE).is_file()]


def _latest(run: Path, steps: list[Path], notes: list[str]) -> Path:
    """Return the checkpoint that the run points to, else the newest whole one."""
    # The pointer holds an absolute path, stale after a move: only its last part is looked at.
    pointer = run / _POINTER
    fields = Table(read_json_object(pointer) if pointer.is_file() else {}, pointer)
    target = fields.optional("checkpoint_dir", TEXT) or ""
    name = target.replace("\\", "/").rstrip("/").rpartition("/")[2]
    ordered = sorted(steps, key=lambda step: step.name != name)
    for step in ordered:
        try:
            _verified(step, step / STATE, [])
        except FormatError as error:
            notes.append(f"{step.name} passed over: {error.message}")
            continue
        return step
    return ordered[0]  # broken, and its defect will be told


def _verified(folder: Path, state: Path, notes: list[str]) -> Mapping[str, Any]:
    """Return the manifest's metadata once every file that it lists is what it says."""
    path = folder / MANIFEST
    if not path.is_file():
        notes.append(f"no {MANIFEST} beside it: nothing says that the file is whole")
        return {}
    if not (folder / COMPLETED).is_file():
        raise FormatError(f"has no {COMPLETED}: saving it was interrupted", path=folder)
    manifest = Table(read_json_object(path), path)
    entries = manifest.get("files", listed(ANY_MAPPING))
    seen = {
        _checked(manifest.inner(f"files[{place}]", entry), folder, path)
        for place, entry in enumerate(entries)
    }
    if state.name not in seen:
        raise FormatError(f"does not list {state.name}", path=path)
    return manifest.optional("metadata", ANY_MAPPING) or {}


def _checked(entry: Table, folder: Path, manifest: Path) -> str:
    """Compare one listed file with its digest; only plain files in the folder are ever opened."""
    name, digest = entry.get("path", text(_LONGEST_NAME)), entry.get("sha256", TEXT)
    plain = name not in {"", ".", ".."} and not set(name) & {"/", "\\", "\0", ":"}
    if not plain:
        raise FormatError(
            "leads out of the checkpoint; nothing was opened", path=manifest, where=name
        )
    file = folder / name
    if file.is_symlink() or not file.is_file():
        raise FormatError("is listed, but is no file of the checkpoint", path=manifest, where=name)
    with readable(file), file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != digest.lower():
        raise FormatError(
            "is not the file that was saved (sha256 differs)", path=folder, where=name
        )
    return name


def _settings(
    folder: Path, run: Path, given: str | None
) -> tuple[TinySettings, Mapping[str, Witness]]:
    if given is not None:
        if not given.endswith(".json"):
            raise NotFoundError(f"a TinyLoRA checkpoint takes a {SETTINGS_FILE} here", path=given)
        return _document(Path(given))
    for place in (folder, run):
        if (place / SETTINGS_FILE).is_file():
            return _document(place / SETTINGS_FILE)
    return TinySettings(), {}


def _document(path: Path) -> tuple[TinySettings, Mapping[str, Witness]]:
    document = read_json_object(path)
    return settings_from(document, path), parse_witnesses(Table(document, path))


def settings_text(settings: TinySettings, witnesses: Mapping[str, Witness]) -> str:
    """Return the text of a tinylora.json."""
    document: dict[str, Any] = {"schema": 1, **settings.document()}
    if witnesses:
        document["witness"] = {name: each.document() for name, each in witnesses.items()}
    return json.dumps(document, indent=2) + "\n"
