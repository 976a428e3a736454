"""Runs of `adapterkit audit`."""

from __future__ import annotations

from typing import Any

from audit_adapters import gaussian


def many(layers: int = 32) -> dict[str, tuple[Any, Any]]:
    """Return pairs of as many modules as an 8B llama has, small."""
    names = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj"
    return {
        f"model.layers.{layer}.{name}": gaussian(12, 10, 3, seed=17 * layer + place)
        for layer in range(layers)
        for place, name in enumerate([*names.split(), "mlp.up_proj", "mlp.down_proj"])
    }
