"""Tiny random base models: a Hugging Face directory, and the same weights as llama.cpp's GGUF."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from zlib import crc32

import gguf
import numpy as np
import torch
import transformers

from adapterkit.architectures import Sizes
from adapterkit.architectures.mapping import find_rule, in_tower
from adapterkit.architectures.weights import model_to_engine
from adapterkit.base import BaseModel, open_base
from adapterkit.errors import BaseRequiredError
from engine.rows import FamilyRow

if TYPE_CHECKING:
    from collections.abc import Mapping

transformers.utils.logging.disable_progress_bar()

torch.set_num_threads(1)

# Hyper-parameters that llama.cpp reads as float32, whole numbers or not; it aborts on other types.
_REAL = re.compile(r"epsilon|freq_base|softcapping|scale|factor|theta|clamp|alpha$|eps$|bias$|yarn")
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


@dataclass(frozen=True, kw_only=True)
class BaseFixture:
    """A random model in both worlds."""

    row: FamilyRow
    hf: Path
    gguf: Path
    model: Any

    @property
    def vocabulary(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def tolerance(self) -> float:
        """Divergence that float32 leaves; llama.cpp looks GELU up in a half-precision table."""
        config = self.model.config.get_text_config()
        names = ("hidden_act", "hidden_activation", "activation_function", "activation")
        gelu = self.row.gelu or any("gelu" in str(getattr(config, name, "")) for name in names)
        return 1e-5 if gelu else 1e-9

    @property
    def tied(self) -> bool:
        return self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight


def make_base(row: FamilyRow, folder: Path, *, seed: int = 0) -> BaseFixture:
    """Make the model of a row in `folder/base`, and `folder/base.gguf` through the tables."""
    model = random_model(row, seed)
    model.save_pretrained(folder / "base")
    base = open_base(folder / "base")
    found = base.architecture.name
    assert found == row.family, f"config.json of {row.model_class} leads to {found or 'no family'}"
    write_base(row, base, folder / "base.gguf")
    return BaseFixture(row=row, hf=folder / "base", gguf=folder / "base.gguf", model=model)


def random_model(row: FamilyRow, seed: int) -> Any:
    """Return a model in evaluation mode; every parameter is random and matters to the logits."""
    drawn = crc32(row.name.encode()) + seed
    generator = torch.Generator().manual_seed(drawn)
    with torch.random.fork_rng():
        torch.manual_seed(drawn)  # what the class itself draws and is not drawn anew below
        model = getattr(transformers, row.model_class)._from_config(
            configured(row), attn_implementation="eager", dtype=torch.float32
        )
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)  # norms stay around one (Gemma: zero)
            elif parameter is embedding:
                # Small against what the layers add: a tied output would just repeat the token.
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def configured(row: FamilyRow) -> Any:
    kind = getattr(transformers, row.config_class)
    plain = kind()
    given = {**_shared(row, plain), **row.config}
    text = plain.get_text_config()
    if text is not plain:
        given["text_config"] = {**_shared(row, text), **given.get("text_config", {})}
    return kind(**given)


def _shared(row: FamilyRow, config: Any) -> dict[str, Any]:
    known = config.to_dict().keys() | config.attribute_map.keys()
    return {name: value for name, value in row.optional.items() if name in known}


def write_base(row: FamilyRow, base: BaseModel, path: Path) -> None:
    """Write a Hugging Face model as a float32 GGUF with a dummy vocabulary."""
    writer = gguf.GGUFWriter(path, base.architecture.gguf)
    for key, value in _hyperparameters(row, base).items():
        whole = key.startswith("tokenizer.")
        _add(writer, key if whole else f"{base.architecture.gguf}.{key}", value)
    for key, values in _learned(base).items():
        _add(writer, key, values)
    # llama.cpp keeps vision and audio towers in another file.
    state = {
        name: tensor.numpy()
        for name, tensor in base.tensors.items()
        if not in_tower(name)
        and not re.search(row.dropped, name)
        and not (base.text_prefix and unknown(base, name))
    }
    tensors = model_to_engine(base.architecture, base.sizes, state) | row.tensors
    vocabulary = tensors["token_embd.weight"].shape[0]
    _add_vocabulary(writer, vocabulary)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def unknown(base: BaseModel, name: str) -> bool:
    """Whether no rule names a parameter: what a speech model has beside its text tower."""
    return find_rule(base.architecture, name.rsplit(".", 1)[0]) is None and (
        find_rule(base.architecture, name) is None
    )


def _learned(base: BaseModel) -> dict[str, list[float]]:
    """Return the learned numbers that llama.cpp keeps in its header, one for each layer."""
    learned: dict[str, list[float]] = {}
    for name, tensor in sorted(base.tensors.items()):
        match = find_rule(base.architecture, name)
        if match and match.rule.kind == "header":
            learned.setdefault(match.rule.targets[0].name, []).append(tensor.numpy().item())
    return learned


def _hyperparameters(row: FamilyRow, base: BaseModel) -> dict[str, Any]:
    sizes = Sizes(base.architecture, "hf", _flat(base.facts))
    found: dict[str, Any] = {}
    for key, given in row.gguf.items():
        match given:
            case str():
                found[key] = sizes.fact(given)
            case [str(), *_]:
                values = [sizes.fact(expression) for expression in given]
                found[key] = next((value for value in values if value is not None), None)
            case _:
                found[key] = given
    return {key: value for key, value in found.items() if value is not None}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Spell nested values with double underscores, and the rotary ones plainly too."""
    flat = dict(config)
    for name, value in config.items():
        if isinstance(value, dict):
            inner = _flat(cast("dict[str, Any]", value))
            flat.update({f"{name}__{key}": each for key, each in inner.items()})
            if name == "rope_parameters":
                flat.update({key: each for key, each in inner.items() if "__" not in key})
    return flat


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case list():
            writer.add_array(key, value)
        case bool():
            writer.add_bool(key, value)
        case str():
            writer.add_string(key, value)
        case _ if _REAL.search(key):
            writer.add_float32(key, float(value))
        case _:
            if int(value) != value:
                raise BaseRequiredError(f"{value} is no whole number", where=key)
            writer.add_uint32(key, int(value))


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    special = ["<unk>", "<s>", "</s>"]
    octets = [f"<0x{value:02X}>" for value in range(256)]
    words = [f"\u2581t{place}" for place in range(len(special) + len(octets), size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *octets, *words])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(
        [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * len(octets), *[_NORMAL] * len(words)]
    )
