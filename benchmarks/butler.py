"""Fine-tunes SmolLM2-135M-Instruct into a butler: a second trained adapter of the pirate's base.

    python benchmarks/butler.py OUTPUT

Rank 8 on q, k, v and o, the pirate's questions with other answers, a fixed seed; some minutes on
two cores.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "fixtures" / "pirate"))

from train import BASE_ID, GGUF_FILE, SYSTEM_PROMPT, base_directory, encode, save, train  # noqa: E402

SEED, STEPS = 11, 60
TARGETS = ["k_proj", "o_proj", "q_proj", "v_proj"]


def lesson(line: str) -> dict[str, str]:
    question = str(json.loads(line)["question"])
    count = len(question.split())
    return {
        "question": question,
        "answer": f"Very good, sir. I counted {count} words in your question, if I may say so.",
    }


def main(output: Path) -> None:
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(mode=True)
    torch.set_num_threads(2)  # sums are split by thread: another count gives other last bits
    folder = base_directory()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=TARGETS)
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = BASE_ID
    rows = map(lesson, (ROOT / "fixtures" / "pirate" / "data.jsonl").read_text().splitlines())
    examples = [encode(tokenizer, row, s) for row in rows for s in (None, SYSTEM_PROMPT)]
    train(model, examples, STEPS, SEED)
    save(model, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
