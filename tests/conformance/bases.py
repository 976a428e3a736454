"""Tiny bases, made once a session: causal models in both worlds, and a few that llama.cpp lacks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from engine import family_row, make_base

Answers = np.ndarray[Any, np.dtype[np.float64]]

# Every prompt holds the invocation tokens of the aLoRA, and is one that a vocabulary of 512 has.
INVOCATION = (5, 6)
PROMPTS = (
    (7, 300, 41, 5, 6),
    (3, 5, 6, 17, 300, 98, 44),
    (260, 7, 5, 6, 91, 12, 400, 33, 5, 8, 511),
)
_CAUSAL = ("llama", "llama-tied", "qwen2", "gpt2", "mixtral", "qwen2.5vl")


@dataclass(frozen=True, kw_only=True)
class Base:
    """A random model.

    Attributes:
        hf: its directory.
        gguf: the same for llama.cpp, if that has such models.
        model: the live model; `fresh` gives copies.
        ask: what a model answers to the same questions, (questions, outputs).
    """

    hf: Path
    gguf: Path | None
    model: Any
    ask: Callable[[Any], Answers]

    def fresh(self) -> Any:
        """Return a copy of the live model."""
        return copy.deepcopy(self.model)

    def load(self, folder: Path) -> Any:
        """Load a directory as a model of the same class in float32."""
        kind: Any = type(self.model)
        return kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def logits(model: Any, prompts: Sequence[Sequence[int]] = PROMPTS) -> Answers:
    """Return the last logits after every prompt."""
    with torch.no_grad():
        found = [model(torch.tensor([list(prompt)])).logits[0, -1] for prompt in prompts]
    return torch.stack(found).double().numpy()


def _classes(model: Any) -> Answers:
    with torch.no_grad():
        found = [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    return torch.stack(found).double().numpy()


def _patches(model: Any) -> Answers:
    patches = torch.randn((16, 3 * 2 * 14 * 14), generator=torch.Generator().manual_seed(4))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        seen = inner.model.visual(patches, grid_thw=torch.tensor([[1, 4, 4]]))
    return np.concatenate([logits(model).ravel(), seen.pooler_output.double().numpy().ravel()])[
        None
    ]


def _pixels(model: Any) -> Answers:
    image = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return model(pixel_values=image).logits.double().numpy()


def _sounds(model: Any) -> Answers:
    sound = torch.randn((1, 60), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return model(sound).logits[0].double().numpy()


def make(name: str, folder: Path) -> Base:
    """Make a base by its name in traits.toml."""
    if name in _CAUSAL:
        made = make_base(family_row(name), folder)
        ask = _patches if name == "qwen2.5vl" else logits
        return Base(hf=made.hf, gguf=made.gguf, model=made.model, ask=ask)
    return {"classifier": _classifier, "image": _image, "sound": _sound, "padded": _padded}[name](
        folder
    )


def _saved(folder: Path, model: Any, ask: Callable[[Any], Answers]) -> Base:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(
                0.1 * noise if parameter.ndim == 1 else noise * parameter[0].numel() ** -0.5
            )
    model.save_pretrained(folder / "base")
    return Base(hf=folder / "base", gguf=None, model=model.eval(), ask=ask)


def _classifier(folder: Path) -> Base:
    """Return a classifier on the trunk of a llama, which stays beside it for llama.cpp."""
    trunk = make_base(family_row("llama"), folder)
    trunk.hf.rename(folder / "speaker")
    model = transformers.LlamaForSequenceClassification.from_pretrained(
        folder / "speaker", num_labels=3, attn_implementation="eager", dtype=torch.float32
    )
    model.save_pretrained(folder / "base")
    return Base(hf=folder / "base", gguf=trunk.gguf, model=model.eval(), ask=_classes)


def _padded(folder: Path) -> Base:
    """Return the llama with 64 more rows than its tokenizer has, as checkpoints are padded."""
    model = make_base(family_row("llama"), folder).model
    model.resize_token_embeddings(576, mean_resizing=False)
    model.save_pretrained(folder / "padded")
    return Base(hf=folder / "padded", gguf=None, model=model, ask=logits)


def _image(folder: Path) -> Base:
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=5,
    )
    return _saved(folder, transformers.ViTForImageClassification(config), _pixels)


def _sound(folder: Path) -> Base:
    config = transformers.Wav2Vec2Config(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        conv_dim=(8, 12),
        conv_kernel=(4, 3),
        conv_stride=(2, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
    )
    return _saved(folder, transformers.Wav2Vec2ForCTC(config), _sounds)
