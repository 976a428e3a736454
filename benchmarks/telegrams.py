"""Train an adapter on made-up telegrams, for the table of rounding: another style, other tensors.

    python benchmarks/telegrams.py FILE.gguf OUT [--targets q_proj,down_proj] [--steps 20]

A LoRA of rank 8 on the matrices of attention and feed-forward alike, made with PEFT against the
decoded weights of any GGUF that transformers reads. Text and first values come from one seed.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED, BATCH, LEARNING_RATE, WARMUP = 11, 2, 3e-3, 4
TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
SENTENCES = (
    "{who} ARRIVED {where} {when}",
    "{what} DELAYED BY {why}",
    "SEND {count} {what} TO {where}",
    "{who} ASKS FOR {what} AT ONCE",
    "PRICE OF {what} NOW {count}",
    "NO NEWS OF {who} SINCE {when}",
    "{why} EXPECTED {where} {when}",
    "PLEASE PAY {who} {count}",
)
WORDS = {
    "who": "MOTHER,CAPTAIN REED,THE BANK,YOUR BROTHER,DOCTOR LANG,THE AGENT,MISS HALL,COUSIN ANN",
    "where": "LISBON,HARBOUR,NORTH STATION,VIENNA,OLD MILL,CAIRO,BRIDGE,SUMMER HOUSE",
    "when": "MONDAY,THIS MORNING,LAST NIGHT,MIDDAY,TENTH OF MAY,AT DAWN,YESTERDAY,NEXT WEEK",
    "what": "COTTON,LETTERS,COAL,MEDICINE,TICKETS,TIMBER,LAMPS,GRAIN",
    "why": "STORM,STRIKE,FOG,SNOW,FLOOD,FEVER,BROKEN RAIL,HEAVY SEA",
    "count": "TWELVE,FORTY,SIXTEEN,TWO HUNDRED,SEVEN,NINETY,THREE,A THOUSAND",
}


def telegram(chance: random.Random) -> str:
    """Return a few sentences, each closed as telegraphs do."""
    words = {name: chance.choice(found.split(",")) for name, found in WORDS.items()}
    chosen = chance.sample(SENTENCES, chance.randint(3, 5))
    return " STOP ".join(sentence.format(**words) for sentence in chosen) + " STOP END\n"


def batch(tokenizer: Any, chance: random.Random, first: Sequence[int]) -> torch.Tensor:
    """Return tokens (telegrams, width) of as many telegrams as fill the width of the shortest."""
    texts = [telegram(chance) for _ in range(BATCH)]
    rows = [[*first, *tokenizer(text, add_special_tokens=False).input_ids] for text in texts]
    width = min(map(len, rows))
    return torch.tensor([row[:width] for row in rows])


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--targets", default=TARGETS)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # sums are split by thread: another count gives other last bits
    chance = random.Random(SEED)  # noqa: S311 - the same telegrams each time, no secret
    place = {"gguf_file": given.model.name, "local_files_only": True}
    folder = str(given.model.resolve().parent)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, **place)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **place)
    targets = given.targets.split(",")
    plan = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=targets)
    model: Any = get_peft_model(base, plan)
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for step in range(given.steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
        tokens = batch(tokenizer, chance, first)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:3d}  loss {loss.item():.3f}", flush=True)
    model.peft_config["default"].base_model_name_or_path = None  # not the directory on this disk
    model.save_pretrained(str(given.output), save_embedding_layers=False)


if __name__ == "__main__":
    main()
