"""Read a GGUF LoRA adapter into Hugging Face names and row order.

The rules of the file are llama.cpp's (src/llama-adapter.cpp): a pair is `X.weight.lora_a` and
`X.weight.lora_b` in PEFT's orientation, except the token embedding, whose A is stored turned; the
scale of a pair is alpha / rank, or 1 where alpha is absent or 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.architectures import Architecture, Sizes, find
from adapterkit.architectures.mapping import from_engine
from adapterkit.base.places import Places
from adapterkit.containers.gguf import GGUFArray, GGUFFile, ValueType, read_gguf
from adapterkit.errors import FormatError, IncompatibleBaseError
from adapterkit.factors import turned
from adapterkit.keys import Role, TensorKey
from adapterkit.model import AdapterTensorSet, GgufSource, Kind, Update
from adapterkit.notes import BaseReference, Provenance
from adapterkit.stamps import KEY as PROOF
from adapterkit.tables import Table, listed, number, shown, text, whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.tensor import LazyTensor

ALPHA = "adapter.lora.alpha"
INVOCATION_TOKENS = "adapter.alora.invocation_tokens"
# Keys that the writer makes itself; every other key of a GGUF source is passed on.
OWN_KEYS = {
    "general.architecture",
    "general.type",
    "general.alignment",
    "adapter.type",
    "adapter.lora.alpha",
    "adapter.alora.invocation_tokens",
    PROOF,
}
EMBEDDING = "token_embd"
# Other files of llama.cpp, by general.type.
_STRANGERS = {
    "imatrix": "is an importance matrix, not an adapter; adapterkit merge A --into BASE.gguf takes "
    "it with --calibrate",
    "mmproj": "is the part of a model that sees or hears (mmproj), not an adapter; pass the "
    "adapter's GGUF",
}
_TOKENS = listed(whole(0, 1 << 40), 1 << 16)


def read_adapter(path: Path, options: FormatOptions) -> AdapterTensorSet:
    """Read a GGUF adapter.

    Args:
        path: the file.
        options: `base` gives the sizes that undo llama.cpp's row order, `moe_layout` the spelling
            of experts.

    Raises:
        FormatError: if the file is not a LoRA adapter, or llama.cpp would not load it.
        IncompatibleBaseError: if the base is of another architecture.
    """
    file = read_gguf(path)
    _check_kind(file)
    notes: list[str] = []
    halves = _halves(file)
    pairs = _pairs(halves, _alpha(file, notes))
    name = Table(file.metadata, path).get("general.architecture", text(1 << 8))
    architecture, sizes = _family(name, pairs, options, path)
    mapped, engine_names = _renamed(architecture, sizes, pairs, options)
    if architecture is None:
        notes.append(f"architecture {name!r} is not in the tables; llama.cpp's names are kept")
    elif engine_names:
        notes.append(f"{len(engine_names)} modules keep llama.cpp's layout; --base would undo it")
    metadata = {key: value for key, value in file.typed().items() if key not in OWN_KEYS}
    return AdapterTensorSet.of(
        mapped,
        _others(file, halves),
        base=BaseReference(name=_base_name(file), architecture=name),
        engine_layout=engine_names,
        invocation_tokens=_invocation_tokens(file),
        source=GgufSource(architecture and architecture.name, metadata),
        provenance=Provenance(path, "gguf", tuple(notes)),
    )


def _renamed(
    architecture: Architecture | None,
    sizes: Sizes | None,
    pairs: list[Update],
    options: FormatOptions,
) -> tuple[list[Update], dict[str, str]]:
    """Return the pairs under Hugging Face names, and module -> tensor of those left as they are."""
    if architecture is None:
        return pairs, {pair.module: pair.module for pair in pairs}
    layout = options.moe_layout or (options.base.expert_layout if options.base else "fused")
    prefix = options.base.text_prefix if options.base else ""
    own = Places(options.base) if options.base and options.base.kind == "hf" else None
    like = options.like or (own.aliases() if own else ())
    mapped = from_engine(architecture, sizes, pairs, layout=layout, like=like, text_prefix=prefix)
    if own and not options.like:
        mapped = mapped.renamed(own.spelling.in_class)
    unknown = set(mapped.unmatched)
    kept = {name: mapped.sources[name][0] for name in mapped.unsized}
    kept.update({name: name for name in mapped.unmatched})
    return [*mapped.pairs, *(pair for pair in pairs if pair.module in unknown)], kept


def _check_kind(file: GGUFFile) -> None:
    if file.metadata.get("general.architecture") == "controlvector":
        raise FormatError(
            "is a control vector, added to activations and not to weights; llama.cpp loads it with "
            "--control-vector",
            path=file.path,
        )
    kind = file.metadata.get("general.type")
    if isinstance(kind, str) and kind in _STRANGERS:
        raise FormatError(_STRANGERS[kind], path=file.path)
    if "token_embd.weight" in file.tensors:
        raise FormatError(
            "is a whole model, not an adapter; what training changed in it is found with: "
            f"adapterkit extract --base BASE --tuned {file.path} -o ADAPTER",
            path=file.path,
        )
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        value = file.metadata.get(key)
        if value != wanted:
            found = "missing" if value is None else shown(value)
            raise FormatError(
                f"{key} is {found}, not {wanted!r}: not a LoRA adapter; pass one that llama.cpp's "
                "convert_lora_to_gguf.py or adapterkit convert -o FILE.gguf has written",
                path=file.path,
            )


def _alpha(file: GGUFFile, notes: list[str]) -> float:
    value = Table(file.metadata, file.path).get(ALPHA, number(), 0.0)
    kind = file.kinds.get(ALPHA, ValueType.FLOAT32)
    if kind is not ValueType.FLOAT32:
        notes.append(f"{ALPHA} is stored as {kind.name}; llama.cpp aborts unless it is FLOAT32")
    return value


def _halves(file: GGUFFile) -> dict[str, dict[str, LazyTensor]]:
    """Group tensors by the base tensor they adapt, without `.weight`."""
    groups: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in file.tensors.items():
        stem, dot, half = name.rpartition(".")
        if half not in {"lora_a", "lora_b"} or not dot:
            continue
        # That of an embedding is stored as (vocabulary, r).
        other = half == "lora_a" and _is_embedding(stem) and len(tensor.shape) > 1
        factor = turned(tensor) if other else tensor
        groups.setdefault(stem.removesuffix(".weight"), {})[half] = factor
    return groups


def _is_embedding(stem: str) -> bool:
    return stem.removesuffix(".weight") == EMBEDDING


def _pairs(halves: Mapping[str, Mapping[str, LazyTensor]], alpha: float) -> list[Update]:
    pairs: list[Update] = []
    for name, group in halves.items():
        if _is_pair(group):
            b = group["lora_b"]
            scale = alpha / b.shape[-1] if alpha and b.shape[-1] else 1.0
            pairs.append(Update(name, group["lora_a"], b, scale, _kind(name, b)))
    return pairs


def _kind(name: str, b: LazyTensor) -> Kind:
    """Return what a pair is of: a tensor of more than two axes stacks experts or heads."""
    if _is_embedding(name):
        return Kind.EMBEDDING
    return Kind.LINEAR if len(b.shape) == 2 else Kind.EXPERTS  # noqa: PLR2004  (a matrix)


def _is_pair(group: Mapping[str, LazyTensor]) -> bool:
    """Tell whether both halves are there and have rows and columns to give meaning to."""
    return len(group) > 1 and all(len(half.shape) > 1 for half in group.values())


def _family(
    name: str, pairs: list[Update], options: FormatOptions, path: Path
) -> tuple[Architecture | None, Sizes | None]:
    base = options.base
    candidates = [a for a in (base.candidates if base else find(name)) if a.gguf == name]
    if base and not candidates:
        base.architecture.require_known(base.path)
        raise IncompatibleBaseError(
            f"is made for architecture {name!r}, the base is {base.architecture.gguf!r}", path=path
        )
    known = {pair.module for pair in pairs}
    candidates.sort(key=lambda a: -sum(bool(a.match_gguf(module)) for module in known))
    if base:
        return candidates[0], Sizes(candidates[0], base.kind, base.facts, base.path)
    return (candidates[0] if candidates else None), None


def _others(
    file: GGUFFile, halves: Mapping[str, Mapping[str, LazyTensor]]
) -> dict[TensorKey, LazyTensor]:
    """Return halves without a partner or a shape, and whole tensors, under llama.cpp's names."""
    roles = {"lora_a": Role.LORA_A, "lora_b": Role.LORA_B}
    loose: dict[TensorKey, LazyTensor] = {}
    for name, group in halves.items():
        if not _is_pair(group):
            loose.update({TensorKey(name, roles[half]): x for half, x in group.items()})
    for name, tensor in file.tensors.items():
        if not name.endswith((".lora_a", ".lora_b")):
            loose[TensorKey(name, Role.FULL)] = tensor
    return loose


def _invocation_tokens(file: GGUFFile) -> tuple[int, ...]:
    if (tokens := file.metadata.get(INVOCATION_TOKENS)) is None:
        return ()
    values = tokens.values() if isinstance(tokens, GGUFArray) else tokens
    return Table({}, file.path).checked(INVOCATION_TOKENS, values, _TOKENS)


def _base_name(file: GGUFFile) -> str | None:
    get = file.metadata.get
    url = get("general.base_model.0.repo_url")
    if isinstance(url, str) and url.rstrip("/").count("/") >= 4:  # noqa: PLR2004  (scheme, host, org, name)
        return "/".join(url.rstrip("/").split("/")[-2:])
    name, organization = get("general.base_model.0.name"), get("general.base_model.0.organization")
    if isinstance(name, str) and isinstance(organization, str):
        return f"{organization}/{name}"
    return name if isinstance(name, str) else None
