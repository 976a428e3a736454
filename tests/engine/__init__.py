"""llama.cpp as an oracle: tiny random models of every family, run there and in transformers.

row = family_row("qwen2")
base = make_base(row, folder)                       # Hugging Face directory and base.gguf
tuned = make_adapter(base, folder / "adapter")      # random PEFT adapter, saved
convert_adapter(tuned.path, base, folder / "adapter.gguf")
prompts = prompts_for(base)
ours = engine_logprobs(base.gguf, prompts, adapters=[(folder / "adapter.gguf", 1.0)])
assert max_kl(logprobs(tuned.model, prompts), ours) < 1e-5
"""

from engine.adapters import AdapterFixture, convert_adapter, idle_modules, make_adapter
from engine.bases import BaseFixture, make_base
from engine.distributions import by_length, kl, logprobs, max_kl, prompts_for
from engine.encoders import embeddings, engine_embeddings, gaps
from engine.rows import FamilyRow, family_row, family_rows
from engine.running import EngineError, engine_logprobs

__all__ = [
    "AdapterFixture",
    "BaseFixture",
    "EngineError",
    "FamilyRow",
    "by_length",
    "convert_adapter",
    "embeddings",
    "engine_embeddings",
    "engine_logprobs",
    "family_row",
    "family_rows",
    "gaps",
    "idle_modules",
    "kl",
    "logprobs",
    "make_adapter",
    "make_base",
    "max_kl",
    "prompts_for",
]
