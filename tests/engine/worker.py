"""The process that holds llama.cpp: a JSON job on stdin, an array of log-probabilities on disk."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import xllamacpp

WORD = 300  # any token that is a word of the dummy vocabulary


def server(job: dict[str, Any]) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.lora_adapters = [
        xllamacpp.CommonAdapterLoraInfo(path, scale) for path, scale in job["adapters"]
    ]
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.n_parallel = 1
    params.warmup = False
    params.fit_params = False
    # Half precision anywhere in attention costs a divergence of 1e-6; without it, 1e-12 is left.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_ram_mib = params.n_ctx_checkpoints = 0
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = 1
        cpu.poll = 0
    params.n_threads_http = 1
    return xllamacpp.Server(params)


def distribution(engine: xllamacpp.Server, prompt: list[int]) -> list[float]:
    question = {
        "prompt": prompt,
        "n_predict": 1,
        "temperature": 0,
        "n_probs": 1 << 20,
        "cache_prompt": False,
        # Probabilities are taken before sampling. Which token is then chosen must not be left to
        # them: for half a character or an end of text the answer would hold none.
        "logit_bias": [[WORD, 1e9]],
    }
    answer = engine.handle_completions(question)
    if "choices" not in answer:
        sys.exit(f"no completion: {json.dumps(answer)}")
    if answer["usage"]["prompt_tokens"] != len(prompt):
        sys.exit(f"the engine saw {answer['usage']} for a prompt of {len(prompt)} tokens")
    (token,) = answer["choices"][0]["logprobs"]["content"]
    ranked = sorted((entry["id"], entry["logprob"]) for entry in token["top_logprobs"])
    if [place for place, _ in ranked] != list(range(len(ranked))):
        sys.exit("the engine left out part of the vocabulary")
    values = [value for _, value in ranked]
    # The engine adds up in float32, where a real vocabulary costs more digits than a tiny one.
    if abs(np.exp(values).sum() - 1) > max(1e-4, 1e-8 * len(values)):
        sys.exit(f"probabilities sum to {np.exp(values).sum()}")
    return values


def main() -> None:
    job = json.load(sys.stdin)
    engine = server(job)
    rows = [distribution(engine, prompt) for prompt in job["prompts"]]
    np.save(job["answer"], np.array(rows, dtype=np.float64))


if __name__ == "__main__":
    main()
