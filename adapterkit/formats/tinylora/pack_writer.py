"""Write checkpoints of the ANRGUSC TinyLoRA pack, with what it forgets beside them."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from adapterkit.errors import UncheckableError
from adapterkit.formats.tinylora.checkpoint import COMPLETED, MANIFEST, STATE, settings_text
from adapterkit.notes import Loss
from adapterkit.tinylora import writing
from adapterkit.tinylora.adapter import carried
from adapterkit.tinylora.settings import SETTINGS_FILE, TinySettings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet
    from adapterkit.tinylora.adapter import TinyAdapter


def losses(adapter: AdapterTensorSet, options: FormatOptions) -> list[Loss]:
    """List what a checkpoint of coefficients cannot hold."""
    del options
    found = writing.losses(adapter)
    tiny = carried(adapter)
    if tiny is not None and tiny.form != "pack":
        message = (
            "its projections are not those that the pack draws; `adapterkit tinylora project` fits "
            "coefficients to them and reports what they cannot reach"
        )
        found.append(Loss("other-projections", "the update", message))
    return found


def write_pack(adapter: AdapterTensorSet, folder: Path, options: FormatOptions) -> None:
    """Write a checkpoint directory: vectors, manifest, settings and witness.

    Args:
        adapter: one that was read from the pack, or projected onto it.
        folder: directory to create.
        options: not used; vectors stay float32.

    Raises:
        UncheckableError: if torch is not installed.
    """
    del options
    tiny = writing.tiny_of(adapter)
    folder.mkdir()
    _save_state(tiny, folder / STATE)
    witnesses = {each.name: each.witness for each in tiny.modules if each.witness}
    text = settings_text(tiny.settings or TinySettings(), witnesses)
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")
    _write_manifest(folder, _metadata(tiny, adapter.base.name))


def _save_state(tiny: TinyAdapter, path: Path) -> None:
    try:
        import torch
    except ImportError:
        raise UncheckableError(f"{STATE} is a file of torch.save; pip install torch") from None
    groups = {module.name: module.group for module in tiny.modules}
    # The pack names a group's vector after the first module that it injected.
    first: dict[int, str] = {}
    for name, group in groups.items():
        first.setdefault(group, name)
    state: dict[str, Any] = {}
    for name in tiny.config.get("keys") or first.values():
        values = tiny.vectors[groups[name]].numpy().astype("float32")
        state[f"{name}.v"] = cast("Any", torch).from_numpy(values)
    torch.save(state, path)


def _metadata(tiny: TinyAdapter, model: str | None) -> Mapping[str, Any]:
    known: Mapping[str, Any] = tiny.config.get("metadata") or {}
    settings = tiny.settings or TinySettings()
    return {
        "model_name": model,
        "seed": settings.seed,
        "trainable_params_counted": tiny.coefficients,
        "inject_summary": {
            "replaced_modules": len(tiny.modules),
            "unique_shared_vectors": len(tiny.vectors),
            "trainable_params_expected": tiny.coefficients,
        },
        **known,
    }


def _write_manifest(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write the manifest and the mark of completion, in the pack's own shape."""
    created = datetime.now(UTC).isoformat()
    manifest = {
        "created_at": created,
        "files": [
            {"path": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
            for name in (STATE, SETTINGS_FILE)
        ],
        "metadata": metadata,
        "run_id": metadata.get("run_id", "adapterkit"),
        "step": metadata.get("step", 0),
    }
    text = json.dumps(manifest, indent=2, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    (folder / COMPLETED).write_text(created + "\n", encoding="utf-8")
