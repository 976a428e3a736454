"""What the layers of a base see of a text, or what llama.cpp's imatrix says of it.

A text is cut into sequences that begin as the model's own do. Where the base's forward pass is
known here it alone is run, with the tokens of transformers; else transformers runs the base.
An imatrix holds the mean square of every input over its tokens, and no direction.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterkit.architectures.mapping import find_rule
from adapterkit.base.activations import computable
from adapterkit.containers.gguf import read_gguf
from adapterkit.errors import FormatError, UncheckableError, UsageError
from adapterkit.merging.into.inputs import (
    TEXT,
    drawn_inputs,
    first_token,
    moments,
    seen_inputs,
    unknown_inputs,
)
from adapterkit.merging.into.steps import Shaping

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from adapterkit.base.model import BaseModel
    from adapterkit.containers.gguf import GGUFFile

Array = np.ndarray[Any, np.dtype[Any]]

_MAGIC = b"GGUF"
# Tokens in a sequence, sequences at most, and tokens of a text at least.
_LENGTH, _SEQUENCES, _LEAST = 256, 8, 64
_LONGEST = 1 << 20
_SUMS, _COUNTS = ".in_sum2", ".counts"


def calibrated_inputs(
    base: BaseModel, file: GGUFFile, names: Collection[str], source: Path
) -> dict[str, Shaping]:
    """Return what counts, by name, for the text or imatrix of a file.

    Args:
        base: a GGUF model.
        file: with the tokenizer's metadata.
        names: of weights.
        source: a text in UTF-8, or an imatrix of llama.cpp in GGUF.

    Raises:
        UsageError: if the text is too short.
        FormatError: if the file is neither, or the imatrix is of another model.
        UncheckableError: if a library that is needed is not installed, or does not take the base.
    """
    with source.open("rb") as stream:
        head = stream.read(len(_MAGIC))
    if head == _MAGIC:
        return _squared_inputs(base, file, names, source)
    return _text_inputs(base, file, names, source)


def _squared_inputs(
    base: BaseModel, file: GGUFFile, names: Collection[str], source: Path
) -> dict[str, Shaping]:
    """Return an imatrix's diagonal, beside the directions that the base's own tokens give."""
    imatrix = read_gguf(source)
    if imatrix.metadata.get("general.type") != "imatrix":
        raise FormatError("is a GGUF file and no imatrix of llama.cpp", path=source)
    drawn = drawn_inputs(base, file, names)
    found: dict[str, Shaping] = {}
    for name in names:
        held = {name + _SUMS, name + _COUNTS} <= imatrix.tensors.keys()
        if not held or name not in base.tensors:
            continue  # a layer that was not run, or is stored elsewhere
        squares = _mean_squares(imatrix, name, source)
        if squares.size != base.tensors[name].shape[-1]:
            raise FormatError(
                f"holds {squares.size} inputs, the base {base.tensors[name].shape[-1]}; is it of "
                "this model?",
                path=source,
                where=name,
            )
        squares *= squares.size / max(float(squares.sum()), 1e-30)
        known = drawn.get(name) or unknown_inputs(squares.size)
        rest = np.maximum(TEXT.moments * squares - np.square(known.seen).sum(0), 0)
        found[name] = Shaping(known.seen, rest, known.first, TEXT.others, TEXT.rounds)
    if not found:
        raise FormatError("holds nothing of the tensors that change", path=source)
    return drawn | found


def _mean_squares(imatrix: GGUFFile, name: str, source: Path) -> Array:
    sums = imatrix.tensors[name + _SUMS].numpy().astype(np.float64)
    counts = imatrix.tensors[name + _COUNTS].numpy().astype(np.float64)
    total = float(counts.sum())
    if not (np.isfinite(sums).all() and (sums >= 0).all() and total > 0):
        raise FormatError("holds no sums of squares", path=source, where=name)
    return sums.reshape(-1, sums.shape[-1]).sum(0) / total


def _text_inputs(
    base: BaseModel, file: GGUFFile, names: Collection[str], source: Path
) -> dict[str, Shaping]:
    if source.stat().st_size > _LONGEST:
        raise UsageError("is longer than a megabyte; a few pages are enough", path=source)
    try:
        text = source.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FormatError(
            "is neither a text in UTF-8 nor an imatrix in GGUF", path=source
        ) from None
    place = {"gguf_file": base.path.name, "local_files_only": True}
    try:
        transformers: Any = import_module("transformers")
        tokenizer = transformers.AutoTokenizer.from_pretrained(base.path.parent, **place)
    except ImportError:
        message = "a text needs transformers; pip install transformers, or give an imatrix.gguf"
        raise UncheckableError(message, path=source) from None
    except (OSError, ValueError, KeyError) as error:
        raise _refused(base, error) from error
    tokens = [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    if len(tokens) < _LEAST:
        message = f"has {len(tokens)} tokens; {_LEAST} at least say what the layers see"
        raise UsageError(message, path=source)
    first = first_token(file)
    sequences = _sequences(tokens, [first] if first is not None else [])
    if computable(base):
        return seen_inputs(base, names, sequences, TEXT)
    return _live_inputs(base, names, sequences, place)


def _sequences(tokens: Sequence[int], first: list[int]) -> list[list[int]]:
    """Return sequences of one length, each from its first token on; the end may be left out."""
    step = min(_LENGTH, len(tokens))
    starts = range(0, len(tokens) - step + 1, step)
    return [[*first, *tokens[start : start + step]] for start in starts[:_SEQUENCES]]


def _live_inputs(
    base: BaseModel,
    names: Collection[str],
    sequences: Sequence[Sequence[int]],
    place: Mapping[str, Any],
) -> dict[str, Shaping]:
    """Return what counts for tokens, as transformers runs the base."""
    torch: Any = import_module("torch")
    models: Any = import_module("transformers").AutoModelForCausalLM
    try:
        model = models.from_pretrained(base.path.parent, dtype=torch.float32, **place).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _refused(base, error) from error
    found: dict[str, Shaping] = {}

    def watch(module: Any, wanted: set[str]) -> None:
        def look(layer: Any, inputs: tuple[Any, ...]) -> None:
            del layer
            seen = inputs[0].detach().numpy().reshape(len(sequences), -1, inputs[0].shape[-1])
            found.update(dict.fromkeys(wanted, moments(list(seen), TEXT)))

        module.register_forward_pre_hook(look)

    for path, module in model.named_modules():
        if wanted := set(names) & _engine_names(base, path):
            watch(module, wanted)
    with torch.no_grad():
        model(torch.tensor(sequences))
    return found


def _engine_names(base: BaseModel, module: str) -> set[str]:
    """Return what llama.cpp calls the weight of a module, all parts of a fused one."""
    match = find_rule(base.architecture, module)
    if match is None:
        return set()
    return {
        f"{target.name.replace('{i}', str(match.layer))}.weight" for target in match.rule.targets
    }


def _refused(base: BaseModel, error: Exception) -> UncheckableError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UncheckableError(
        f"transformers does not take it: {reason}; an imatrix.gguf needs no transformers",
        path=base.path,
    )
