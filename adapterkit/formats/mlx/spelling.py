"""Module names of MLX-LM's models beside Hugging Face's, as data.

Most modules are called alike. Those that are not are spelled here as the `sanitize` methods of
mlx_lm/models rename them when they load a Hugging Face checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.architectures.mapping import find_rule

if TYPE_CHECKING:
    from collections.abc import Collection

    from adapterkit.base import BaseModel

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
FUSED = "gate_up_proj"
# Last components of the modules that mlx-lm makes of nn.Embedding.
_TABLES = {
    "embed_tokens",
    "wte",
    "wpe",
    "embed_in",
    "word_embeddings",
    "tok_embeddings",
    "embeddings",
}
_LAYER = re.compile(r"^(?:.+\.)?(?:layers|h|blocks)\.(?P<layer>\d+)\.(?P<name>.+)$")


@dataclass(frozen=True, slots=True)
class Renamed:
    """A module that the two call differently.

    Attributes:
        hf: pattern of the Hugging Face path.
        mlx: pattern of the MLX path.
        to_mlx: replacement that turns the first into the second.
        to_hf: replacement back.
        family: GGUF architecture for which alone it holds, where others share the name.
        shared: whether other families' modules have that MLX path too.
    """

    hf: re.Pattern[str]
    mlx: re.Pattern[str]
    to_mlx: str
    to_hf: str
    family: str | None = None
    shared: bool = False


RENAMED = (
    Renamed(
        re.compile(r"^transformer\.(h\.\d+\.(?:attn|mlp)\.c_\w+|wte|wpe)$"),
        re.compile(r"^model\.(h\.\d+\.(?:attn|mlp)\.c_\w+|wte|wpe)$"),
        r"model.\1",
        r"transformer.\1",
        "gpt2",
    ),
    Renamed(
        re.compile(r"^gpt_neox\.layers\.(\d+\.(?:attention\.|mlp\.dense_).+)$"),
        re.compile(r"^model\.h\.(\d+\.(?:attention\.|mlp\.dense_).+)$"),
        r"model.h.\1",
        r"gpt_neox.layers.\1",
    ),
    # Granite's router, which is a layer of its own class in transformers 5.
    Renamed(
        re.compile(r"^(.+\.block_sparse_moe\.router)$"),
        re.compile(r"^(.+\.block_sparse_moe\.router)\.layer$"),
        r"\1.layer",
        r"\1",
    ),
    Renamed(
        re.compile(r"^(.+\.mlp\.gate)$"),
        re.compile(r"^(.+\.mlp\.gate)\.proj$"),
        r"\1.proj",
        r"\1",
        "laguna",
        shared=True,
    ),
    Renamed(
        re.compile(r"^(.+\.mlp)\.shared_experts\.(\w+)$"),
        re.compile(r"^(.+\.mlp)\.shared_expert\.(\w+)$"),
        r"\1.shared_expert.\2",
        r"\1.shared_experts.\2",
        "laguna",
        shared=True,
    ),
    *(
        Renamed(
            re.compile(rf"^(.+\.feed_forward)\.{theirs}$"),
            re.compile(rf"^(.+\.feed_forward)\.{ours}$"),
            rf"\1.{ours}",
            rf"\1.{theirs}",
            "lfm2moe",
            shared=True,
        )
        for ours, theirs in ((GATE, "w1"), (UP, "w3"), (DOWN, "w2"))
    ),
    *(
        Renamed(
            re.compile(r"^model\.(layers\.\d+\..+|embeddings)$"),
            re.compile(r"^backbone\.(layers\.\d+\..+|embeddings)$"),
            r"backbone.\1",
            r"model.\1",
            family,
            shared=True,
        )
        for family in ("nemotron_h", "nemotron_h_moe")
    ),
    # Multimodal classes of transformers from 4.52 on; the prefix before that was MLX's.
    Renamed(
        re.compile(r"^model\.language_model\.(.+)$"),
        re.compile(r"^language_model\.model\.(.+)$"),
        r"language_model.model.\1",
        r"model.language_model.\1",
    ),
)


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Where a family keeps its experts.

    Attributes:
        mlx: the SwitchGLU, relative to its block.
        single: one expert in Hugging Face checkpoints, `{e}` for its number.
        fused: the module of fused parameters in transformers 5.
        leaves: SwitchGLU's projection -> Hugging Face's.
        router: the router's module in MLX, and where experts are fused in transformers 5.
    """

    mlx: str
    single: str
    fused: str
    leaves: Mapping[str, str]
    router: tuple[str, str]


EXPERTS = (
    ExpertNames(
        "block_sparse_moe.switch_mlp",
        "block_sparse_moe.experts.{e}",
        "mlp.experts",
        {GATE: "w1", UP: "w3", DOWN: "w2"},
        ("block_sparse_moe.gate", "mlp.gate"),
    ),
    ExpertNames(
        "mlp.switch_mlp",
        "mlp.experts.{e}",
        "mlp.experts",
        {GATE: GATE, UP: UP, DOWN: DOWN},
        ("mlp.gate", "mlp.gate"),
    ),
)

# Families whose stacks have other names than those, by GGUF architecture -> the SwitchGLU, relative
# to its block; llama.cpp's tensors tell what its projections are in Hugging Face's class.
SWITCHES: Mapping[str, str] = {
    "gpt-oss": "mlp.experts",
    "gemma4": "experts.switch_glu",
    "granitemoe": "block_sparse_moe.switch_mlp",
    "granitehybrid": "block_sparse_moe.switch_mlp",
    "afmoe": "mlp.experts",
    "dots1": "mlp.experts",
    "jamba": "feed_forward.switch_mlp",
    "lfm2moe": "feed_forward.switch_mlp",
}
_ENGINE = {GATE: "ffn_gate_exps", UP: "ffn_up_exps", DOWN: "ffn_down_exps"}


def engine_stack(module: str, base: BaseModel) -> str | None:
    """Return llama.cpp's tensor of an MLX stack, for the families in `SWITCHES`; else None."""
    place = in_block(module)
    container, _, leaf = place[2].rpartition(".") if place else ("", "", "")
    if place and leaf in _ENGINE and SWITCHES.get(base.architecture.gguf) == container:
        return f"blk.{place[1]}.{_ENGINE[leaf]}"
    return None


def switch_of(tensor: str, base: BaseModel, blocks: str) -> str | None:
    """Return the MLX stack of one of llama.cpp's tensors, undoing `engine_stack`."""
    container = SWITCHES.get(base.architecture.gguf)
    _, layer, name = tensor.split(".", 2)
    leaf = next((leaf for leaf, engine in _ENGINE.items() if engine == name), None)
    return f"{blocks}{layer}.{container}.{leaf}" if container and leaf else None


def stack_in(stack: str, base: BaseModel | None) -> str:
    """Return the path of a stack in the base's family, given as those of most families are."""
    container = SWITCHES.get(base.architecture.gguf) if base else None
    found = stack_of(stack)
    return f"{found[1]}{container}.{found[2]}" if container and found else stack


def in_block(module: str) -> tuple[str, int, str] | None:
    """Split a path into what precedes its block, the block's number and the name in the block."""
    match = _LAYER.match(module)
    if match is None:
        return None
    return module[: match.start("layer")], int(match["layer"]), match["name"]


def is_table(module: str) -> bool:
    """Tell whether a module is an embedding table, whose factors are stored (vocabulary, r)."""
    return module.rpartition(".")[2] in _TABLES


def hugging_face(module: str, like: Collection[str], *, fused: bool, base: BaseModel | None) -> str:
    """Return the Hugging Face path of an MLX module that is not a stack of experts.

    Args:
        module: MLX path.
        like: paths to prefer where there are several spellings.
        fused: whether the model's experts are one parameter, which moves Mixtral's router.
        base: tells which of several families' names it is.
    """
    family = base.architecture.gguf if base else None
    spellings = [
        rule.mlx.sub(rule.to_hf, module)
        for rule in RENAMED
        if rule.mlx.match(module) and (not rule.shared or rule.family == family)
    ]
    for names in EXPERTS:
        old, new = names.router
        if module.endswith(f".{old}"):
            moved = f"{module.removesuffix(old)}{new}"
            spellings += [moved, module] if fused else [module, moved]
    if module == "language_model.lm_head":
        spellings.append("lm_head")
    spellings.append(module)
    return next((name for name in spellings if name in like), spellings[0])


def mlx(module: str, base: BaseModel | None) -> str | None:
    """Return the MLX path of a Hugging Face module; None if only the base could tell."""
    for rule in RENAMED:
        if not rule.hf.match(module):
            continue
        if rule.family and base is None and not rule.shared:
            return None
        if rule.family in {None, base and base.architecture.gguf}:
            return rule.hf.sub(rule.to_mlx, module)
    if module == "lm_head" and base and base.text_prefix:
        return "language_model.lm_head"
    place = in_block(module)
    if place and place[2] == "mlp.gate" and base and expert_names(base, place[0]) is EXPERTS[0]:
        return f"{place[0]}{place[1]}.{EXPERTS[0].router[0]}"
    return module


def expert_names(base: BaseModel, blocks: str) -> ExpertNames | None:
    """Return how the base's family spells experts, or None if it has none that MLX-LM stacks."""
    for names in EXPERTS:
        leaf = names.leaves[GATE]
        if find_rule(base.architecture, f"{blocks}0.{names.single.replace('{e}', '0')}.{leaf}"):
            return names
    return None


def stack_of(module: str) -> tuple[ExpertNames, str, str] | None:
    """Take apart the path of an MLX stack: its names, the block's path, the projection."""
    place = in_block(module)
    for names in EXPERTS:
        container, _, leaf = place[2].rpartition(".") if place else ("", "", "")
        if place and container == names.mlx and leaf in names.leaves:
            return names, f"{place[0]}{place[1]}.", leaf
    return None


def expert_of(module: str) -> tuple[str, int] | None:
    """Return the MLX stack and the number of one Hugging Face expert's module."""
    place = in_block(module)
    for names in EXPERTS:
        pattern = re.escape(names.single).replace(r"\{e\}", r"(\d+)") + r"\.(\w+)"
        found = re.fullmatch(pattern, place[2]) if place else None
        if place and found:
            for leaf, hf_leaf in names.leaves.items():
                if hf_leaf == found[2]:
                    return f"{place[0]}{place[1]}.{names.mlx}.{leaf}", int(found[1])
    return None
