"""What engines do with the heads that PEFT saves for classifiers, and with added tokens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import peft
import pytest
import transformers

from adapterkit import Severity, read, validate
from fixtures.classes.tiny import built

if TYPE_CHECKING:
    from pathlib import Path

# PEFT asks transformers by a name that is leaving.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def classifier(name: str, folder: Path, targets: list[str]) -> Path:
    """Save a tiny model of a class, and an adapter with its head as PEFT writes it."""
    model: Any = built(getattr(transformers, name), "cpu")
    model.save_pretrained(str(folder / "base"))
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets)
    settings.init_lora_weights = False
    peft.get_peft_model(model, settings).save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def codes(adapter: Path, target: str) -> tuple[set[str], str]:
    report = validate(adapter, base=adapter.parent / "base", targets=[target])
    errors = {each.code for each in report.findings if each.severity is Severity.ERROR}
    return errors, str(report.targets[0].verdict)


@pytest.mark.parametrize(
    ("name", "targets", "vllm"),
    [
        ("BertForSequenceClassification", ["query", "value"], (set[str](), "applied")),
        ("Qwen3ForSequenceClassification", ["q_proj", "v_proj"], (set[str](), "applied")),
        (
            "RobertaForSequenceClassification",
            ["query", "value"],
            ({"VLLM004", "VLLM005"}, "refused"),
        ),
    ],
)
def test_one_matrix_is_a_head(
    name: str, targets: list[str], vllm: tuple[set[str], str], tmp_path: Path
) -> None:
    adapter = classifier(name, tmp_path, targets)
    assert codes(adapter, "vllm") == vllm
    # SGLang looks for the number of a layer behind `layers.`, which BERT's names do not have.
    found = any(".layers." in module for module in read(adapter).modules)
    wanted = ({"SGL011"}, "partly applied") if found else ({"SGL011", "AK501"}, "no effect")
    assert codes(adapter, "sglang") == wanted
    assert codes(adapter, "peft") == (set(), "applied")


def test_tokens_count_that_the_base_has_no_row_for(tmp_path: Path) -> None:
    adapter = classifier("Qwen3ForSequenceClassification", tmp_path, ["q_proj"])
    rows = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    file = adapter / "added_tokens.json"
    file.write_text(json.dumps({"<old>": rows - 1}), encoding="utf-8")
    assert "SGL014" not in codes(adapter, "sglang")[0]
    file.write_text(json.dumps({"<old>": rows - 1, "<new>": rows}), encoding="utf-8")
    errors, fate = codes(adapter, "sglang")
    assert "SGL014" in errors
    assert fate == "refused"
    assert codes(adapter, "vllm") == (set(), "applied")
    file.write_text("{", encoding="utf-8")
    assert "SGL014" not in codes(adapter, "sglang")[0]
