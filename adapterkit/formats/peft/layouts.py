"""Layouts of trainers that write PEFT's files and not PEFT's modules, put where the base has them.

Tinker (tinker_cookbook/weights/_merge.py) names the experts of every model w1 (gate), w3 (up) and
w2 (down), each factor (E, r, in) or (E, out, r), a first axis of 1 meaning the same for all, and
the output `unembed_tokens`. Unsloth trains GPT-OSS in 4 bits (unsloth_zoo/temporary_patches/
gpt_oss.py) with a linear layer for each expert, `gate_up_projs.E` and `down_projs.E`, whose rows
are in the order of the parameter that they stand for.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.base import find_base
from adapterkit.errors import BaseRequiredError, FormatError, UnknownArchitectureError
from adapterkit.factors import stack_experts
from adapterkit.model import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import numpy as np

    from adapterkit.base import BaseModel
    from adapterkit.model import AdapterTensorSet, Update
    from adapterkit.tensor import LazyTensor

_STACK = re.compile(r"^(?:.+\.)?layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<leaf>w[123])$")
_ENGINE = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
_LISTED = re.compile(r"^(?P<stack>.+\.experts\.(?:gate_up|down)_proj)s\.(?P<expert>\d{1,6})$")
# Tinker's name -> Hugging Face's; the second only where the base has no module of the first.
_OUTPUT = re.compile(r"^(?:model\.)*unembed_tokens$")
_ATTENTION = re.compile(r"(?<=\.)attn(?=\.[qkvo]_proj$)")


def is_stack(module: str) -> bool:
    """Tell whether factors of three axes at a path are those of experts."""
    return bool(_STACK.match(module))


def in_place(adapter: AdapterTensorSet, base: BaseModel | None, path: Path) -> AdapterTensorSet:
    """Return the adapter with the modules of such layouts under the base's names.

    Raises:
        BaseRequiredError: if the place of experts depends on the base and none is known.
        FormatError: if both factors of a pair are the same for all experts, or counts disagree.
    """
    names = {pair.module for pair in adapter.pairs()}
    if not any(is_stack(n) or _LISTED.match(n) or _OUTPUT.match(n) for n in names):
        return adapter
    plain: list[Update] = []
    stacks: list[Update] = []
    listed: dict[str, dict[int, Update]] = defaultdict(dict)
    for pair in adapter.pairs():
        if named := _LISTED.match(pair.module):
            listed[named["stack"]][int(named["expert"])] = pair
        elif not is_stack(pair.module):
            plain.append(replace(pair, module=_renamed(pair.module, base)))
        elif pair.a.size or pair.b.size:  # an empty pair holds the place of a missing projection
            stacks.append(_spread(pair, path))
    plain += _experts_in_base(stacks, base or _cached(adapter), path)
    plain += [_stacked(name, members, base) for name, members in listed.items()]
    keys = {key for pair in adapter.pairs() for key in pair.keys}
    others = {key: tensor for key, tensor in adapter.tensors.items() if key not in keys}
    return adapter.replace(tensors=others, scales={}, kinds={}, rank_conflicts={}).updated(plain)


def _cached(adapter: AdapterTensorSet) -> BaseModel | None:
    try:
        return find_base(adapter.base.name)
    except UnknownArchitectureError:
        return None


def _renamed(module: str, base: BaseModel | None) -> str:
    from adapterkit.architectures.mapping import find_rule

    if _OUTPUT.match(module):
        return "lm_head"
    other = _ATTENTION.sub("self_attn", module)
    if other == module or base is None or find_rule(base.architecture, module):
        return module
    return other if find_rule(base.architecture, other) else module


def _experts_in_base(stacks: list[Update], base: BaseModel | None, path: Path) -> Iterable[Update]:
    from adapterkit.architectures.mapping import from_engine

    if not stacks:
        return ()
    if base is None:
        raise BaseRequiredError(
            "is called as Tinker calls experts, whose place depends on the model; give the base "
            "model with --base",
            path=path,
            where=stacks[0].module,
        )
    engine: list[Update] = []
    for pair in stacks:
        if named := _STACK.match(pair.module):
            name = f"blk.{named['layer']}.{_ENGINE[named['leaf']]}"
            engine.append(replace(pair, module=name))
    mapped = from_engine(
        base.architecture,
        base.sizes,
        engine,
        layout=base.expert_layout,
        text_prefix=base.text_prefix,
    )
    if mapped.unmatched:
        raise FormatError(
            f"adapts experts, and {base.architecture.title} has none; is it the right base?",
            path=path,
            where=mapped.unmatched[0],
        )
    return mapped.pairs


def _spread(pair: Update, path: Path) -> Update:
    """Return a stack whose factors are both there for every expert."""
    first, second = pair.a.shape[0], pair.b.shape[0]
    if first != second and 1 not in {first, second}:
        raise FormatError(f"A is of {first} experts, B of {second}", path=path, where=pair.module)
    experts = max(first, second)
    if experts == 1:
        raise FormatError(
            "both factors are the same for all experts, and nothing says how many there are",
            path=path,
            where=pair.module,
        )
    a, b = _repeated(pair.a, experts), _repeated(pair.b, experts)
    return replace(pair, a=a, b=b, kind=Kind.EXPERTS)


def _repeated(tensor: LazyTensor, experts: int) -> LazyTensor:
    if tensor.shape[0] == experts:
        return tensor

    def repeated(x: np.ndarray) -> np.ndarray:
        return x.repeat(experts, axis=0)

    return tensor.map(repeated, shape=(experts, *tensor.shape[1:]))


def _stacked(name: str, members: dict[int, Update], base: BaseModel | None) -> Update:
    known = base.sizes.get("experts") if base else None
    count = max(max(members) + 1, known if isinstance(known, int) else 0)
    return stack_experts([members.get(expert) for expert in range(count)], name)
