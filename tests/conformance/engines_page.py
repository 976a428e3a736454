"""docs/engines.md is the engines' data, engine by trait: run this file to write it anew."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from adapterkit import Severity, Target, load_target, target_names
from adapterkit.architectures.expressions import evaluate
from adapterkit.engines.facts import facts
from adapterkit.model import AdapterTensorSet

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
# What a column is called, the facts that make it, and the loss of GGUF that stands for it.
TRAITS: dict[str, tuple[dict[str, Any], str]] = {
    "PEFT": ({}, ""),
    "GGUF": ({"format": "gguf"}, ""),
    "rsLoRA": ({"rslora": True}, ""),
    "patterns": ({"rank_pattern": True, "alpha_pattern": True, "scales_differ": True}, ""),
    "DoRA": ({"dora": True}, "dora"),
    "saved modules": ({"saved_modules": 1}, "saved-module"),
    "embeddings": ({"embedding": True}, ""),
    "fused experts": ({"experts_fused": True}, ""),
}
HEAD = """# What each engine does with what adapters have

Written by tests/conformance/engines_page.py from adapterkit/engines/*.toml, which
`adapterkit validate --target ENGINE` works with.

- **yes**: nothing in the engine's rules speaks against it.
- **--for**: not as it stands; `adapterkit convert --for ENGINE` writes what it serves, exactly.
- **refused**, **altered**, **partly applied**, **no effect**, ...: what becomes of the file; the
  hint of `validate` says what to do, most often `merge --into`.
- What an engine leaves out of an adapter that it applies in part is a loss: `convert --for ENGINE`
  names it and stops, and with `--allow-lossy` writes the rest.
- Whether an embedding or fused experts are served depends on the model as well; `validate` with
  `--base` asks for the one at hand.
"""


def cell(engine: Target, trait: str) -> str:
    """Return what an engine makes of one trait, by its own rules."""
    given, loss = TRAITS[trait]
    native = engine.format or "peft"
    plain = facts(AdapterTensorSet(tensors={}, scales={}), None) | {"format": native}
    if trait == "PEFT":
        given = {"format": "peft"}
    known = plain | given
    if code := engine.losses.get(loss):
        return str(engine.effects.get(code, "refused"))
    for rule in engine.rules:
        if rule.severity is not Severity.ERROR or not evaluate(rule.when, known.__getitem__):
            continue
        if rule.fix:
            return "--for"
        return str(engine.effects.get(rule.code, engine.effects.get("error", "altered")))
    return "--for" if trait == "PEFT" and native != "peft" else "yes"


def largest(engine: Target) -> str:
    """Return the largest rank that the rules know a limit of."""
    limits = [int(n) for rule in engine.rules for n in re.findall(r"max_rank > (\d+)", rule.when)]
    return " / ".join(map(str, sorted(set(limits)))) or "-"


def page() -> str:
    """Return docs/engines.md."""
    engines = [load_target(name) for name in target_names()]
    head = ["engine", *TRAITS, "rank up to", "known by"]
    rows = [
        [
            engine.title,
            *(cell(engine, trait) for trait in TRAITS),
            largest(engine),
            "run here" if re.search(r"\brun\b", engine.source) else "read in its source",
        ]
        for engine in engines
    ]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    sources = "\n".join(f"- {e.title}: {e.source}; {e.checked}." for e in engines)
    return f"{HEAD}\n{table}\n\n## Sources\n\n{sources}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
