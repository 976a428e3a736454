"""Tensor names in PEFT files, and the wrappers that training leaves in them."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from adapterkit.errors import UnsupportedError
from adapterkit.keys import Role, TensorKey
from adapterkit.model.update import GATHER, ONE_RANK
from adapterkit.notes import Note, NoteKind

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from adapterkit.base import BaseModel

PREFIX = "base_model.model."

# leaf of a saved name -> role; an adapter name such as `.default` may have leaked into it
_LEAVES = (
    (re.compile(r"^(.+)\.lora_A(?:\.[^.]+)?\.weight$"), Role.LORA_A),
    (re.compile(r"^(.+)\.lora_B(?:\.[^.]+)?\.weight$"), Role.LORA_B),
    (re.compile(r"^(.+)\.lora_B(?:\.[^.]+)?\.bias$"), Role.LORA_BIAS),
    (re.compile(r"^(.+)\.lora_embedding_A(?:\.[^.]+)?$"), Role.EMBEDDING_A),
    (re.compile(r"^(.+)\.lora_embedding_B(?:\.[^.]+)?$"), Role.EMBEDDING_B),
    (
        re.compile(r"^(.+)\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?$"),
        Role.MAGNITUDE,
    ),
    (re.compile(r"^(.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$"), Role.TOKEN_ROWS),
)
_SAVED = re.compile(r"^(.+)\.modules_to_save(?:\.[^.]+)?\.((?:[^.]+\.)*[^.]+)$")
_BASE_COPY = re.compile(r"^(.+?)(?:\.token_adapter)?(?:\.base_layer)+\.weight$")
_BASE_BIAS = re.compile(r"^(.+?)(?:\.base_layer)+\.(bias)$")
# Modules that training puts around others, wherever they stand in a path -> what does so.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
_LEAKED = re.compile(rf"(?:^|(?<=\.))({'|'.join(_WRAPPERS)})\.")
# PEFT around a part of the model, below the names of the whole.
_INNER_PREFIX = re.compile(r"(?<=\.)base_model\.model\.")
# What DDP and DeepSpeed put around a model; a class may have an attribute of this name, too.
_MODULE = "module."
_MODULES = re.compile(r"^(?:module\.)+")
_AGAIN = re.compile(rf"^(?:(?:module\.)*{re.escape(PREFIX)})+")
# An attribute of the trainer that holds the whole model: no class nests one of this name twice.
_HOLDER = "model."
# Attributes of trainers that no model has (TRL's value heads, trainers of policies).
_HOLDERS = frozenset({"pretrained_model.", "actor.", "state_dict.", "base_model."})
# PEFT's own attribute without the one that it holds the model in: no class of transformers has it.
_HALF_PREFIX = "base_model."
_HALVES = re.compile(r"^(?:base_model\.)+")
_ADAPTER_NAME = re.compile(
    r"\.(?:lora_[AB]\.(?!weight$|bias$)[^.]+\.(?:weight|bias)|lora_embedding_[AB]\.[^.]+)$"
)
# Tensors that training uses and inference does not (PEFT drops them when it merges).
_TRAINING_ONLY = re.compile(r"\.(lora_velora_embed|lora_monteclora_sampler)(\.|$)")
_FACTOR = ".lora_"
# A frozen copy of the base that wrapping left behind; it is no part of the adapter.
_FROZEN_COPY = re.compile(r"\.original_module\.")
_COPY_LEFT_OUT = "left out, frozen copy of the base (original_module)"


class KeyReader:
    """Turns saved names into keys and remembers what it had to clean up."""

    def __init__(
        self, path: Path, names: Iterable[str] = (), base: BaseModel | None = None
    ) -> None:
        """Look at all names of a file, and at the base's, which tell wrappers from real modules.

        Args:
            path: of the file, for messages.
            names: all that it holds; what they do not share is no wrapper of the whole model.
            base: the model; one whose names are known decides alone.
        """
        self._path = path
        self._seen: Counter[tuple[str, NoteKind]] = Counter()
        self._tops = _tops(base) if base is not None and base.kind == "hf" else frozenset[str]()
        self._shared = min(map(_depth, _wrapped(names)), default=None)

    def read(self, name: str) -> TensorKey | None:
        """Return the key of a saved name, or None for one that is no part of the adapter.

        Raises:
            UnsupportedError: if it is a LoRA tensor of a kind that adapterkit does not know.
        """
        path = self._unwrapped(name)
        if _TRAINING_ONLY.search(path):
            self._seen["left out, used in training only", NoteKind.REMARK] += 1
            return None
        if _FROZEN_COPY.search(path):
            self._seen[_COPY_LEFT_OUT, NoteKind.REMARK] += 1
            return None
        if _ADAPTER_NAME.search(path):
            self._seen["adapter name taken out of the tensor name", NoteKind.ADAPTER_NAME] += 1
        for pattern, role in _LEAVES:
            if match := pattern.match(path):
                return TensorKey(match[1], role)
        if match := _BASE_COPY.match(path):
            return TensorKey(match[1], Role.BASE_COPY)
        if match := _SAVED.match(path) or _BASE_BIAS.match(path):
            return TensorKey(f"{match[1]}.{match[2]}", Role.FULL)
        if _FACTOR in path and path.endswith("flat_param"):
            raise UnsupportedError(f"{ONE_RANK}; {GATHER}", path=self._path, where=name)
        if _FACTOR in path:
            raise UnsupportedError(
                "is a LoRA tensor of an unknown kind, which may change what the others mean; "
                "merge the adapter with the PEFT that saved it (merge_and_unload), and pass the "
                "model to adapterkit extract --base BASE --tuned MODEL -o ADAPTER",
                path=self._path,
                where=name,
            )
        return TensorKey(path, Role.FULL)

    def _unwrapped(self, name: str) -> str:
        for wrapper in sorted(set(_LEAKED.findall(name))):
            self._seen[f"{wrapper}. taken out ({_WRAPPERS[wrapper]})", NoteKind.PREFIX] += 1
        path = _LEAKED.sub("", name)
        if path.startswith(_MODULE) and (outside := self._without_wrapper(path)) != path:
            path = outside
            self._seen["module. taken off (DDP, DeepSpeed)", NoteKind.PREFIX] += 1
        if not (path.startswith(_HALF_PREFIX) or _INNER_PREFIX.search(path)):
            if _FACTOR in path:
                self._seen[f"had no {PREFIX} prefix", NoteKind.PREFIX] += 1
            else:
                told = f"had no {PREFIX} prefix, so that PEFT leaves them out"
                self._seen[told, NoteKind.STRAY] += 1
        path = path.removeprefix(PREFIX)
        path = self._without_inner(path)
        if inner := _INNER_PREFIX.search(path):
            self._seen[f"{PREFIX} inside the name taken out", NoteKind.PREFIX] += 1
            outer, rest = path[: inner.start()], path[inner.end() :]
            whole = outer in _HOLDERS or (outer == _HOLDER and rest.startswith(_HOLDER))
            path = rest if whole else outer + rest
        if path.startswith(_HALF_PREFIX):
            self._seen[f"{_HALF_PREFIX} without model. taken off", NoteKind.PREFIX] += 1
            path = _HALVES.sub("", path)
        return path

    def _without_inner(self, path: str) -> str:
        """Return a path without what PEFT and the trainer put around the model once more."""
        if inside := _AGAIN.match(path):
            self._seen[f"doubled {PREFIX} prefix taken off", NoteKind.PREFIX] += 1
            path = path[inside.end() :]
        bare = self._without_wrapper(path)
        if bare != path:
            unsure = "" if self._tops else "; with --base, a module of the base's is told from it"
            told = f"module. below {PREFIX} taken off (DDP, DeepSpeed){unsure}"
            self._seen[told, NoteKind.PREFIX] += 1
        return bare

    def _without_wrapper(self, path: str) -> str:
        """Return a path without the `module.` that no module of the model is called.

        The base decides; without one, what all names of the file share is taken for a wrapper.
        """
        if PREFIX in path:
            return _MODULES.sub("", path)
        depth = _depth(path)
        if self._tops:
            real = (
                taken for taken in range(depth) if _top(path[taken * len(_MODULE) :]) in self._tops
            )
            taken = next(real, depth)
        else:
            taken = depth if self._shared is None else self._shared
        return path[taken * len(_MODULE) :]

    def notes(self) -> tuple[Note, ...]:
        """Return one sentence for each kind of clean-up, with its count."""
        return tuple(
            Note(f"{count} tensor name{'s' if count > 1 else ''}: {what}", kind)
            for (what, kind), count in self._seen.items()
        )


def _tops(base: BaseModel) -> frozenset[str]:
    return frozenset(_top(name) for name in base.names)


def _top(path: str) -> str:
    """Return the two outermost components of a path."""
    return ".".join(path.split(".", 2)[:2])


def _depth(path: str) -> int:
    """Return how many `module.` a path begins with."""
    return (len(path) - len(_MODULES.sub("", path))) // len(_MODULE)


def _wrapped(names: Iterable[str]) -> list[str]:
    """Return what stands below PEFT's prefix in the names that have one; all names if none has."""
    bare = [_LEAKED.sub("", name) for name in names]
    below = [name.rpartition(PREFIX)[2] for name in bare if PREFIX in name]
    return below or bare


def saved_name(key: TensorKey, adapted: Iterable[str], tokens: Collection[str] = ()) -> str:
    """Return the name under which PEFT saves and looks for a tensor.

    Args:
        key: the tensor.
        adapted: all modules with factors, whose full bias sits in a base layer.
        tokens: all modules with rows of tokens, which are wrapped in another way.
    """
    leaves = {
        Role.LORA_A: ".lora_A.weight",
        Role.LORA_B: ".lora_B.weight",
        Role.LORA_BIAS: ".lora_B.bias",
        Role.EMBEDDING_A: ".lora_embedding_A",
        Role.EMBEDDING_B: ".lora_embedding_B",
        Role.MAGNITUDE: ".lora_magnitude_vector",
        Role.TOKEN_ROWS: ".token_adapter.trainable_tokens_delta",
        Role.BASE_COPY: ".base_layer.weight",
    }
    if key.role is Role.BASE_COPY and key.module in tokens:
        return f"{PREFIX}{key.module}.token_adapter.base_layer.weight"
    if key.role in leaves:
        return PREFIX + key.module + leaves[key.role]
    module, _, parameter = key.module.rpartition(".")
    wrapped = parameter == "bias" and module in set(adapted)
    return f"{PREFIX}{module}{'.base_layer' if wrapped else ''}.{parameter}"
