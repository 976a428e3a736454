"""What a tensor does, and for which module."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class Role(StrEnum):
    """What a tensor does for its module.

    Shapes: LORA_A (r, in), LORA_B (out, r), of experts (E, r, in) and (E, out, r), of convolutions
    (r, in, *kernel) and (out, r, 1...); EMBEDDING_A (r, vocabulary), EMBEDDING_B (width, r);
    MAGNITUDE (out,) of DoRA, COLUMN_MAGNITUDE (in,) of the DoRA by column that LyCORIS and
    OneTrainer train; LORA_BIAS (out,) added after B, scaled like it; FULL, an absolute replacement
    of a parameter; TOKEN_ROWS (tokens, width), absolute rows of an embedding; BASE_COPY, the frozen
    weight under an adapted embedding, which PEFT saves and never trains.
    """

    LORA_A = "lora_A"
    LORA_B = "lora_B"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "magnitude"
    COLUMN_MAGNITUDE = "column_magnitude"
    LORA_BIAS = "lora_bias"
    FULL = "full"
    BASE_COPY = "base_copy"
    TOKEN_ROWS = "token_rows"  # noqa: S105  (not a password)


# Roles of A and B of a weight, and of an embedding table.
FACTORS = (Role.LORA_A, Role.LORA_B)
EMBEDDING_FACTORS = (Role.EMBEDDING_A, Role.EMBEDDING_B)
# The other factor of the same update.
PARTNERS: Mapping[Role, Role] = MappingProxyType(
    {
        Role.LORA_A: Role.LORA_B,
        Role.LORA_B: Role.LORA_A,
        Role.EMBEDDING_A: Role.EMBEDDING_B,
        Role.EMBEDDING_B: Role.EMBEDDING_A,
    }
)


@dataclass(frozen=True, slots=True, order=True)
class TensorKey:
    """Where a tensor belongs.

    Attributes:
        module: Hugging Face path in the base model, without training wrappers:
            `model.layers.0.self_attn.q_proj`. For a bare parameter (fused experts, and every FULL
            tensor) the parameter's path: `model.layers.0.mlp.experts.down_proj`, `lm_head.weight`.
        role: what the tensor does for the module.
    """

    module: str
    role: Role

    def __str__(self) -> str:
        """Return the key as messages name it."""
        return f"{self.module}.{self.role}"


def is_one_expert(module: str) -> bool:
    """Tell whether a path is of one expert among others, each a module of its own: `experts.3`."""
    parts = pairwise(module.split("."))
    return any(name.endswith("experts") and number.isdigit() for name, number in parts)
