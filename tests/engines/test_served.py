"""The engines' lists of models: as their packages have them, where those are installed."""

from __future__ import annotations

import json
import runpy
import sys
from importlib.metadata import distribution
from pathlib import Path

import mlx_lm.utils
import pytest

from adapterkit.served import served

ROOT = Path(__file__).parents[2]
LISTS = json.loads((ROOT / "adapterkit" / "served.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("engine", "name", "lora"),
    [
        ("vllm", "LlamaForCausalLM", True),
        ("vllm", "BertForSequenceClassification", True),
        ("vllm", "RobertaModel", True),
        ("vllm", "GPT2LMHeadModel", False),
        ("vllm", "BloomForCausalLM", False),
        ("vllm", "FalconForCausalLM", False),
        ("vllm", "MambaForCausalLM", False),
        ("vllm", "StableLmForCausalLM", False),
        ("vllm", "T5ForConditionalGeneration", None),
        ("sglang", "LlamaForCausalLM", True),
    ],
)
def test_what_is_known_of_a_class(engine: str, name: str, *, lora: bool | None) -> None:
    models = served(engine)
    assert (name in models.lora, name in models.without) == (lora is True, lora is False)


@pytest.mark.parametrize(
    ("engine", "kind", "takes"),
    [
        ("lorax", "llama", True),
        ("lorax", "gpt2", True),
        ("lorax", "falcon", False),
        ("lorax", "t5", False),
        ("lorax", "qwen3", None),
        ("tgi", "llama", True),
        ("tgi", "starcoder2", True),
        ("tgi", "gpt_neox", False),
        ("tgi", "qwen3", None),
        ("mlx", "bloom", None),
    ],
)
def test_what_is_known_of_a_type(engine: str, kind: str, *, takes: bool | None) -> None:
    models = served(engine)
    assert models.lacks_type(kind) is (takes is None)
    assert (kind in models.types_without) is (takes is False)
    assert (kind in models.layers) is (takes is True and engine != "mlx")


def test_modules_that_have_a_place() -> None:
    lorax, tgi = served("lorax"), served("tgi")
    assert lorax.takes("mixtral", "model.layers.0.self_attn.q_proj")
    assert not lorax.takes("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1")
    assert lorax.takes("llama", "lm_head")
    assert not lorax.takes("gemma", "lm_head")
    assert tgi.takes("llama", "model.layers.0.mlp.down_proj")
    assert not tgi.takes("gpt2", "transformer.h.0.mlp.c_proj")
    assert served("vllm").takes("llama", "anything")


@pytest.mark.parametrize("engine", LISTS)
def test_no_class_stands_twice(engine: str) -> None:
    models = served(engine)
    assert models.version
    assert not models.lora & models.without
    assert models.types_without <= models.types
    assert models.lora or models.types


def test_nothing_is_known_of_a_stranger() -> None:
    assert served("hal") == served("peft")
    assert not served("hal").lora


def test_mlx_has_what_is_listed() -> None:
    models = served("mlx")
    assert models.version == distribution("mlx-lm").version
    for kind in models.types - {"olmo"}:  # which imports a package of its own
        model, arguments = mlx_lm.utils._get_classes({"model_type": kind})
        assert model.__name__ == "Model", kind
        assert arguments.__name__ == "ModelArgs", kind
    with pytest.raises(ValueError, match="bloom"):
        mlx_lm.utils._get_classes({"model_type": "bloom"})


def test_the_list_is_what_its_script_makes_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Path(mlx_lm.utils.__file__).parents[1]
    for source in (site / "mlx_lm", *site.glob("mlx_lm-*.dist-info")):
        (tmp_path / source.name).symlink_to(source)
    out = tmp_path / "served.json"
    out.write_text(json.dumps(LISTS | {"mlx": {}}), encoding="utf-8")
    make = runpy.run_path(str(ROOT / "fixtures" / "engines" / "make.py"))
    make["main"].__globals__["OUT"] = out
    monkeypatch.setattr(sys, "argv", ["make.py", f"mlx={tmp_path}"])
    make["main"]()
    assert json.loads(out.read_text(encoding="utf-8")) == LISTS
