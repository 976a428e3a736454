"""Settings of extract, and the ranks it chose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from checkpoint_bases import (
    LINEAR,
)

if TYPE_CHECKING:
    from adapterkit import ExtractReport


def ranks(report: ExtractReport) -> set[int]:
    return {module.rank for module in report.modules}


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": LINEAR}),
    "rslora": ("llama", {"target_modules": LINEAR, "use_rslora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "experts": (
        "mixtral",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
}
