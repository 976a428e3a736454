"""What was written, run by the program that it is for and held against PEFT's live model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx_oracle
import numpy as np
import onnx_oracle
import torch
import transformers
from engine import engine_logprobs, max_kl
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from conformance.bases import PROMPTS, Answers, logits
from conformance.making import WEIGHTS, Made, loaded, quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# What two ways to compute the same leave in float32, of the size of the answers; in nats for
# distributions; and the least that an update must do to be seen.
CLOSE, NATS, EFFECT = 2e-5, 1e-5, 1e-3


def apart(want: Answers, got: Answers) -> float:
    """Return the largest difference of answers, relative to their size."""
    if want.shape != got.shape:
        return float("inf")
    return float(np.abs(want - got).max() / np.abs(want).max())


def peft(made: Made, out: Path, want: Answers) -> str:
    """Load what was written with PEFT."""
    return _compared(want, made.answers(loaded(made.fresh(), out)))


def peft_and_beside(made: Made, out: Path, want: Answers) -> str:
    """Load what was written with PEFT; trained files beside the adapter must have come along."""
    for file in made.path.glob("*.safetensors"):
        copy = out / file.name
        own = file.name.startswith(Path(WEIGHTS).stem)
        if not own and not (copy.exists() and copy.read_bytes() == file.read_bytes()):
            return f"{file.name} is not carried"
    return peft(made, out, want)


def huggingface(made: Made, out: Path, want: Answers) -> str:
    """Load the merged model with transformers."""
    with quiet():
        return _compared(want, made.answers(made.base.load(out)))


def gguf_adapter(made: Made, out: Path, want: Answers) -> str:
    """Run the adapter in llama.cpp on the base."""
    assert made.base.gguf is not None
    got = engine_logprobs(made.base.gguf, PROMPTS, [(out, 1.0)])
    if made.path.suffix == ".gguf":  # the engine rounds activations too where factors are q8_0
        want = engine_logprobs(made.base.gguf, PROMPTS, [(made.path, 1.0)])
    return _run(want, got)


def gguf_model(made: Made, out: Path, want: Answers) -> str:
    """Run the merged model in llama.cpp."""
    del made
    return _run(want, engine_logprobs(out, PROMPTS))


def mlx(made: Made, out: Path, want: Answers) -> str:
    """Load what was written by the rules of mlx-lm."""
    model = made.base.fresh()
    if isinstance(model, transformers.GPT2LMHeadModel):
        _by_ending(model, out)
        return _compared(want, made.answers(model))
    if hasattr(model.model, "language_model"):
        _by_ending(model, out)
        return _compared(want, logits(model))
    if isinstance(model, transformers.LlamaForSequenceClassification):
        model = transformers.LlamaForCausalLM.from_pretrained(made.base.hf.parent / "speaker")
        mlx_oracle.load(model, out)
        return _compared(want, logits(model))
    mlx_oracle.load(model, out, stacks=_switch_layers(model))
    # Without the trait the questions are those that the base has tokens for.
    plain = logits(model)
    return _compared(want, plain if plain.shape == want.shape else made.answers(model))


def onnx_adapter(made: Made, out: Path, want: Answers) -> str:
    """Let onnxruntime multiply the factors, on a graph with inputs for every linear layer."""
    got = made.answers(_multiplied(made.fresh(), out))
    # Without the trait the questions are those that the base has tokens for.
    return _compared(
        want, got if got.shape == want.shape else logits(_multiplied(made.base.fresh(), out))
    )


def _multiplied(model: Any, out: Path) -> Any:
    """Add to every linear layer what onnxruntime makes of its factors."""
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear | Conv1D)
    }
    turned = {name: isinstance(layer, torch.nn.Linear) for name, layer in layers.items()}
    shapes = {
        name: tuple(layer.weight.shape[::-1] if turned[name] else layer.weight.shape)
        for name, layer in layers.items()
    }
    for name, update in onnx_oracle.updates(out, shapes).items():
        added = torch.from_numpy(update.T if turned[name] else update)
        # A weight of its own: the output may share the embedding's.
        layers[name].weight = torch.nn.Parameter(layers[name].weight.detach() + added)
    return model


def _by_ending(model: Any, out: Path) -> None:
    """Add an MLX adapter to a model whose blocks MLX-LM calls otherwise: W += scale (A B)ᵀ."""
    scale = json.loads((out / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    stored = load_file(out / "adapters.safetensors")
    for name in [name for name in stored if name.endswith(".lora_a")]:
        path = name.removesuffix(".lora_a")
        ending = "." + ".".join(path.split(".")[-4:])
        (layer,) = [m for n, m in model.named_modules() if n.endswith(ending) and "visual" not in n]
        update = scale * stored[name] @ stored[f"{path}.lora_b"]
        with torch.no_grad():
            layer.weight.add_(update if type(layer).__name__ == "Conv1D" else update.T)


def _switch_layers(model: Any) -> Mapping[str, torch.Tensor]:
    """Return Mixtral's experts as mlx-lm holds them, as views into the model."""
    found: dict[str, torch.Tensor] = {}
    for number, block in enumerate(model.model.layers):
        experts = getattr(block.mlp, "experts", None)
        if experts is None:
            continue
        half = experts.gate_up_proj.shape[1] // 2
        stem = f"model.layers.{number}.block_sparse_moe.switch_mlp"
        found[f"{stem}.gate_proj"] = experts.gate_up_proj.data[:, :half]
        found[f"{stem}.up_proj"] = experts.gate_up_proj.data[:, half:]
        found[f"{stem}.down_proj"] = experts.down_proj.data
    return found


def _compared(want: Answers, got: Answers) -> str:
    error = apart(want, got)
    return "" if error < CLOSE else f"answers are {error:.1e} off"


def _run(want: Answers, got: Answers) -> str:
    if want.shape != got.shape:
        return f"answers have shape {got.shape}, not {want.shape}"
    error = max_kl(want, got)
    return "" if error < NATS else f"distributions are {error:.1e} nats off"


JUDGES: Mapping[str, Callable[[Made, Path, Answers], str]] = {
    "to-peft": peft_and_beside,
    "to-gguf": gguf_adapter,
    "to-mlx": mlx,
    "to-onnx-adapter": onnx_adapter,
    "merge": peft,
    "into-hf": huggingface,
    "into-gguf": gguf_model,
    "compress": peft_and_beside,
    "extract": peft,
    "stack": peft,
}
