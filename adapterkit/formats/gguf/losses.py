"""What llama.cpp cannot hold of an adapter, and what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.advice import MERGE, MERGE_AND_CONVERT, MERGE_INSTEAD, MERGE_UNTIED, OR_LEAVE_OUT
from adapterkit.architectures import LLAMA_CPP
from adapterkit.architectures.mapping import find_rule, in_tower
from adapterkit.base.copies import lost_copies
from adapterkit.base.heads import foreign_parameters, lost_biases, lost_heads
from adapterkit.base.places import vocabulary_rows
from adapterkit.dtype import DType
from adapterkit.formats.gguf.engine import EngineAdapter, engine_adapter
from adapterkit.keys import Role, TensorKey
from adapterkit.model import GgufSource, Kind, spelled_out
from adapterkit.model.beside import lost_beside
from adapterkit.model.declared import UNDECIDED, undeclared
from adapterkit.model.losses import (
    lost_columns,
    lost_metadata,
    lost_named_settings,
    lost_roles,
    lost_tensors,
    tensors_of,
)
from adapterkit.notes import Loss, first_and_more

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from adapterkit.base import BaseModel
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.model import AdapterTensorSet

_GROW = f"merge it into the Hugging Face base, which then has these rows {MERGE_AND_CONVERT}"
_AS_TRAINED = (
    "merge the adapter that this was made from into the base, or leave it out with --allow-lossy"
)
_MERGED = (
    f"{MERGE_INSTEAD}, and make a GGUF of a merged directory with llama.cpp's "
    f"convert_hf_to_gguf.py; {OR_LEAVE_OUT}"
)
_NAME_LIMIT = 63  # llama.cpp's tensor names have 64 bytes, the last one zero

_ROLES = {
    Role.MAGNITUDE: (
        "dora",
        (
            f"DoRA magnitudes have no place in a GGUF adapter; {MERGE_INSTEAD}, or take the "
            "nearest LoRA (adapterkit convert SRC -o FILE.gguf --base BASE --dora-rank N "
            "--allow-lossy, BASE with its weights)"
        ),
    ),
    Role.TOKEN_ROWS: ("token-rows", f"trained token rows have no place there; {MERGE_INSTEAD}"),
}
_SETTINGS = {
    "initialisation": (
        "base-changing-init",
        (
            "this initialisation changed the base, so B · A is no update of the original one; "
            "PiSSA and OLoRA convert exactly with the base's weights (--base DIRECTORY), others "
            "if you save it with PEFT's path_initial_model_for_weight_conversion"
        ),
    ),
    "pooled_inputs": ("qalora", UNDECIDED),
    "layer_replication": (
        "layer-replication",
        "layers are replicated; llama.cpp has one block for each; merge in PEFT first",
    ),
}


def losses(adapter: AdapterTensorSet, options: FormatOptions) -> list[Loss]:
    """List every reason at once; no tensor data is read."""
    adapter = spelled_out(adapter)
    base = options.base
    found = [
        *_by_role(adapter, base),
        *_saved(adapter, base),
        *lost_named_settings(adapter, _SETTINGS),
    ]
    found += [*undeclared(adapter), *lost_beside(adapter.beside), *lost_metadata(adapter)]
    engine = engine_adapter(adapter, options)
    found += [*_early(adapter), *_convolutions(adapter)]
    found += _unmatched(adapter, engine, options)
    found += _copies(adapter, base)
    found += _inert(engine, options)
    if base is not None and base.tied:
        found += _tied(adapter, base)
    if base is not None and base.architecture.verified == "no" and not options.unverified:
        message = "no engine test covers this family yet; pass --unverified to convert anyway"
        found.append(Loss("unverified", base.architecture.title, message))
    if options.dtype is DType.Q8_0:
        found += _blocks(engine)
    return found


def _by_role(adapter: AdapterTensorSet, base: BaseModel | None) -> Iterator[Loss]:
    yield from lost_roles(adapter, _ROLES)
    yield from lost_biases(adapter, base, "a GGUF adapter")
    yield from lost_columns(adapter)


def _saved(adapter: AdapterTensorSet, base: BaseModel | None) -> Iterator[Loss]:
    full = [key for key in adapter.tensors if key.role is Role.FULL]
    if isinstance(adapter.source, GgufSource) and (
        stray := [k for k in full if _is_weight(k.module)]
    ):
        message = "is no part of an adapter, and llama.cpp refuses the file; leave it out with"
        yield lost_tensors("stray-tensor", stray, f"{message} --allow-lossy")
        full = [key for key in full if key not in stray]
    kinds: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
        ("saved-bias", "a trained bias has no place in a GGUF adapter", _is_bias),
        ("saved-norm", "llama.cpp loads norms and never applies them", _is_norm),
        ("saved-module", "a whole trained weight has no place in a GGUF adapter", _is_weight),
    )
    # llama.cpp's names are in no table of Hugging Face's.
    nameless = isinstance(adapter.source, GgufSource)
    foreign = [] if nameless else foreign_parameters(adapter, base)
    resized = {key: rows for key in full if (rows := _other_rows(key, adapter, base))}
    for key, rows in resized.items():
        held = adapter.tensors[key].shape[0]
        yield lost_tensors(
            "resized-vocabulary", [key], f"has {held} rows, the base {rows}; {_GROW}"
        )
    full = [key for key in full if key not in resized]
    for code, reason, fits in kinds:
        if keys := [key for key in full if fits(key.module) and key not in foreign]:
            yield lost_tensors(code, keys, f"{reason}; {_AS_TRAINED if nameless else _MERGED}")
    yield from lost_heads(foreign, ", and convert that with llama.cpp's convert_hf_to_gguf.py")


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def _is_norm(name: str) -> bool:
    return not _is_bias(name) and "norm" in name.split(".")[-2:][0]


def _is_weight(name: str) -> bool:
    return not _is_bias(name) and not _is_norm(name)


def _early(adapter: AdapterTensorSet) -> Iterator[Loss]:
    """Say where llama.cpp lets an aLoRA begin: it cuts the prompt before the wrong token."""
    if adapter.invocation_tokens:
        message = (
            f"llama.cpp (seen on {LLAMA_CPP}) lets it act from one token before them on, PEFT from "
            "their first; answers differ a little"
        )
        subject = f"alora_invocation_tokens = {list(adapter.invocation_tokens)}"
        yield Loss("alora-early", subject, message, blocks=False)


def _convolutions(adapter: AdapterTensorSet) -> Iterator[Loss]:
    if found := [pair.module for pair in adapter.pairs() if pair.kind is Kind.CONVOLUTION]:
        message = f"llama.cpp applies no adapter to convolutions; {MERGE_INSTEAD}"
        yield lost_tensors("convolution", tensors_of(adapter, found), message)


def _unmatched(
    adapter: AdapterTensorSet, engine: EngineAdapter, options: FormatOptions
) -> Iterator[Loss]:
    said = {pair.module for pair in adapter.pairs() if pair.kind is Kind.CONVOLUTION}
    unmatched = [module for module in engine.unmatched if module not in said]
    towers = [module for module in unmatched if in_tower(module)]
    others = [module for module in unmatched if not in_tower(module)]
    title = options.base.architecture.title if options.base else engine.architecture
    if towers:
        message = "belongs to a vision or audio tower, which llama.cpp keeps in another file"
        yield lost_tensors("tower", tensors_of(adapter, towers), f"{message}; {MERGE_INSTEAD}")
    scaled = {module: name for module in others if (name := _scale_of(module, options.base))}
    if scaled:
        name = next(iter(scaled.values()))
        message = f"{name} scales what an expert gives, and not what llama.cpp adds to it"
        yield lost_tensors("no-target", tensors_of(adapter, scaled), f"{message}; {MERGE_INSTEAD}")
    others = [module for module in others if module not in scaled]
    known = [module for module in others if options.base and _known(module, options.base)]
    if known:
        message = f"llama.cpp applies no adapter to this part of {title}"
        yield lost_tensors("no-target", tensors_of(adapter, known), f"{message}; {MERGE_INSTEAD}")
    if unknown := [module for module in others if module not in known]:
        message = f"is no module of {title} that llama.cpp can adapt; is it the right base?"
        yield lost_tensors("no-target", tensors_of(adapter, unknown), message)
    for pair in engine.pairs:
        name = f"{pair.module}.weight.lora_a"
        if len(name.encode()) > _NAME_LIMIT:
            yield Loss("name-too-long", name, f"is longer than {_NAME_LIMIT} bytes")


def _known(module: str, base: BaseModel) -> bool:
    return find_rule(base.architecture, module) is not None


def _scale_of(module: str, base: BaseModel | None) -> str | None:
    """Return the base's parameter that scales what comes out of a module, by its last name."""
    match = find_rule(base.architecture, module) if base else None
    if base is None or match is None or match.rule.kind != "tensor":
        return None
    name = match.rule.targets[0].name.removesuffix(".weight") + ".scale"
    scales = (r.hf for r in base.architecture.rules if any(t.name == name for t in r.targets))
    return next((scale.rpartition(".")[2] for scale in scales), None)


def _inert(engine: EngineAdapter, options: FormatOptions) -> Iterator[Loss]:
    if options.base is None:
        return
    architecture = options.base.architecture
    names = [pair.module for pair in engine.pairs if architecture.is_inert(pair.module)]
    modules = list(dict.fromkeys(m for name in names for m in engine.sources[name]))
    if modules:
        message = (
            f"llama.cpp (seen on {LLAMA_CPP}) loads this pair and never applies it; "
            f"only merging carries it ({MERGE})"
        )
        yield Loss("inert", first_and_more(modules), message, blocks=False)


def _copies(adapter: AdapterTensorSet, base: BaseModel | None) -> Iterator[Loss]:
    """Leave out copies of base weights, unless the vocabulary was resized and the base's was not.

    PEFT saves the weight under an adapted embedding or output (`save_embedding_layers`) and never
    trains it.
    """
    for key, copy in adapter.tensors.items():
        if key.role is not Role.BASE_COPY:
            continue
        if rows := _other_rows(key, adapter, base):
            message = f"was resized to {copy.shape[0]} rows, the base has {rows}; {_GROW}"
            yield lost_tensors("resized-vocabulary", [key], message)
        else:
            yield from lost_copies(adapter.replace(tensors={key: copy}), base)


def _other_rows(key: TensorKey, adapter: AdapterTensorSet, base: BaseModel | None) -> int:
    """Return the rows of the base's table where a whole one has others, else 0."""
    rows = vocabulary_rows(key.module, base) if base else None
    return 0 if rows in {None, adapter.tensors[key].shape[0]} else rows or 0


def _tied(adapter: AdapterTensorSet, base: BaseModel) -> Iterator[Loss]:
    for pair in adapter.pairs():
        match = find_rule(base.architecture, pair.module)
        name = match.rule.targets[0].name if match else ""
        keys = tensors_of(adapter, [pair.module])
        if name == "token_embd":
            reason = "the output shares this table, and llama.cpp aborts on it"
            yield lost_tensors("tied-embedding", keys, f"{reason}; {MERGE_UNTIED}")
        elif name == "output":
            reason = "the base has no output weight of its own (tied embeddings)"
            yield lost_tensors("tied-output", keys, f"{reason}; {MERGE_UNTIED}")


def _blocks(engine: EngineAdapter) -> Iterator[Loss]:
    """Say which factors q8_0 cannot hold: they are stored as float16 instead."""
    block = DType.Q8_0.block
    short = [pair for pair in engine.pairs if pair.rank % block or pair.a.shape[-1] % block]
    if short:
        message = f"q8_0 needs rows of {block}: factors with shorter ones are stored as f16"
        names = [pair.module for pair in short]
        yield Loss("q8_0-block", first_and_more(names), message, blocks=False)
