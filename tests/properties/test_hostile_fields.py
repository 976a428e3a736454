"""Whatever stands in a field of a config, the answer is a result or an error in one line."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from moments import a_moment

import adapterkit
from adapterkit.auditing.reference_bank import read_bank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[2] / "fixtures"
TINY, BASE = FIXTURES / "peft" / "tiny", FIXTURES / "peft" / "base"
EXAMPLES = 40
LONGEST = 3000

HOSTILE = st.sampled_from(
    [
        *(10**400, -(10**400), 10**12, 1e12, -1, 0, 1.5, 2**31),
        *(float("nan"), float("inf"), None, True, False),
        *("8" * 500, "", "\x1b[2J", [], [[[]]], [1], ["a"], [{"x": []}], [-1]),
        *({}, {"a": [1]}, {"q_proj": "x"}, {"8": 10**400}),
    ]
)
LORA: dict[str, Any] = {
    **json.loads((TINY / "adapter_config.json").read_text()),
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 8},
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "peft_version": "0.19.1",
    "use_rslora": False,
    "use_dora": False,
    "use_bdlora": {"nblocks": 1, "target_modules_bd_a": ["k_proj"], "target_modules_bd_b": []},
    "use_qalora": False,
    "qalora_group_size": 16,
    "target_parameters": ["mlp.experts.up_proj"],
    "modules_to_save": None,
    "layers_to_transform": [0, 1],
    "init_lora_weights": True,
}
CONFIG: dict[str, Any] = {
    **json.loads((BASE / "config.json").read_text()),
    "head_dim": 8,
    "num_local_experts": 2,
    "transformers_version": "4.40.0",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
NESTED: dict[str, Any] = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {**CONFIG, "model_type": "gemma3_text"},
    "vision_config": {"hidden_size": 8},
}
RECIPE: dict[str, Any] = {
    "adapters": [{"path": "a", "weight": 0.5, "modules": {"q_proj": 0.5}}],
    "method": "ties",
    "params": {"density": 0.5},
    "rank": 4,
    "tol": 0.1,
    "seed": 1,
    "normalize": True,
    "out": "merged",
}
BANK: dict[str, Any] = {
    "kind": "adapterkit audit bank",
    "schema": 1,
    "members": [{"source": "a", "base_model": "b", "families": {"q_proj": {"entropy": 1.0}}}],
}


def paths(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every field of a document, at any depth."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*at, key)
        if isinstance(value, (dict, list)):
            yield from paths(value, (*at, key))


@st.composite
def changed(draw: st.DrawFn, *documents: dict[str, Any]) -> dict[str, Any]:
    """One of the documents, with one of its fields replaced."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    *above, last = draw(st.sampled_from(list(paths(document))))
    holder: Any = document
    for key in above:
        holder = holder[key]
    holder[last] = draw(HOSTILE)
    return document


def answers(*calls: Callable[[], object]) -> None:
    """Run every call to a result, or to an error of ours in one short line."""
    for call in calls:
        with a_moment():
            try:
                call()
            except adapterkit.AdapterKitError as error:
                said = str(error)
            else:
                said = ""
        assert len(said) < LONGEST
        assert said.replace("\n", "").isprintable()


def copied(source: Path, folder: Path, config: dict[str, Any]) -> Path:
    path = shutil.copytree(source, folder / "a")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def tried(path: Path, base: Path, folder: Path) -> None:
    answers(
        lambda: adapterkit.inspect(path),
        lambda: adapterkit.validate(path, base=base),
        lambda: adapterkit.convert(path, folder / "x.gguf", base=base),
        lambda: adapterkit.convert(path, folder / "peft", base=base),
        lambda: adapterkit.convert(path, folder / "mlx", to="mlx", base=base),
    )


@settings(max_examples=EXAMPLES, deadline=None)
@given(changed(LORA, {**LORA, "use_qalora": True}))
def test_a_lora_config(config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tried(copied(TINY, Path(folder), config), BASE, Path(folder))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_the_config_of_another_tuner_or_trainer(data: st.DataObject) -> None:
    sources = (
        *sorted(path.parent for path in (FIXTURES / "tuners").glob("*/adapter_config.json")),
        *sorted(path.parent for path in (FIXTURES / "mlx").glob("*/adapter_config.json")),
        FIXTURES / "tinylora" / "peft",
    )
    source = data.draw(st.sampled_from(sources))
    config = data.draw(changed(json.loads((source / "adapter_config.json").read_text())))
    base = FIXTURES / "tuners" / "base" if source.parent.name == "tuners" else BASE
    with tempfile.TemporaryDirectory() as folder:
        tried(copied(source, Path(folder), config), base, Path(folder))


@settings(max_examples=EXAMPLES, deadline=None)
@given(changed(CONFIG, NESTED))
def test_the_config_of_a_base(config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "config.json"
        base.write_text(json.dumps(config))
        tried(TINY, base, Path(folder))


@settings(max_examples=EXAMPLES, deadline=None)
@given(changed(RECIPE))
def test_a_recipe(recipe: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        answers(lambda: adapterkit.read_recipe(path))


@settings(max_examples=EXAMPLES, deadline=None)
@given(changed(BANK))
def test_a_bank(bank: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.json"
        path.write_text(json.dumps(bank))
        answers(lambda: read_bank(path))


@settings(max_examples=EXAMPLES, deadline=None)
@given(changed({"metadata": {}, "weight_map": {"lm_head.weight": "model.safetensors"}}))
def test_the_index_of_a_checkpoint(index: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = shutil.copytree(BASE, Path(folder) / "base")
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        merged = Path(folder) / "merged"
        answers(lambda: adapterkit.open_base(base))
        answers(lambda: adapterkit.merge_into([TINY], base, merged))
