"""MLX adapters are read as mlx-lm applies them, and refused where a file does not say how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig

import adapterkit
from adapterkit.base import open_base
from adapterkit.formats.mlx.config import targeting
from adapterkit.formats.mlx.probe import is_mlx
from adapterkit.formats.mlx.reader import read_mlx
from adapterkit.formats.protocol import Options
from adapterkit.keys import Role, TensorKey
from adapterkit.registry import detect

if TYPE_CHECKING:
    from adapterkit.model import AdapterTensorSet

Q = "model.layers.0.self_attn.q_proj"
R, IN, OUT, E = 4, 12, 20, 3


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([*shape, seed]).normal(size=shape).astype(np.float32)


def saved(
    folder: Path,
    tensors: dict[str, np.ndarray],
    *,
    name: str = "adapters.safetensors",
    parameters: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write an adapter as mlx-lm's trainer does."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    document = {
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": {"rank": R, "scale": 20.0, "dropout": 0.0, **(parameters or {})},
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def read(path: Path, **options: Any) -> AdapterTensorSet:
    return read_mlx(path, Options(**options))


def dense(adapter: AdapterTensorSet) -> dict[str, np.ndarray]:
    return {
        pair.module: pair.scale * pair.b.numpy().astype(float) @ pair.a.numpy().astype(float)
        for pair in adapter.pairs()
    }


def same(got: np.ndarray, want: np.ndarray) -> None:
    """Equal but for the order in which float64 products were summed."""
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= 1e-14 * np.linalg.norm(want)


def hf(folder: Path, config: Any) -> Any:
    """Save a bare config.json and open it as a base."""
    config.save_pretrained(folder)
    return open_base(folder / "config.json")


def linear(module: str = Q) -> dict[str, np.ndarray]:
    return {f"{module}.lora_a": drawn(IN, R), f"{module}.lora_b": drawn(R, OUT)}


def test_update_is_scale_times_a_times_b_turned(tmp_path: Path) -> None:
    tensors = linear()
    path = saved(tmp_path, tensors, model="org/base")
    assert detect(path).name == "mlx"
    adapter = read(path)
    want = 20.0 * (tensors[f"{Q}.lora_a"].astype(float) @ tensors[f"{Q}.lora_b"]).T
    same(dense(adapter)[Q], want)
    assert adapter.base.name == "org/base"
    assert dict(adapter.scales) == {Q: 20.0}


def test_a_checkpoint_is_read_by_its_own_name(tmp_path: Path) -> None:
    path = saved(tmp_path, linear(), name="0000100_adapters.safetensors")
    with pytest.raises(adapterkit.NotFoundError, match="0000100_adapters"):
        read(path)
    assert detect(path / "0000100_adapters.safetensors").name == "mlx"
    assert read(path / "0000100_adapters.safetensors").modules == (Q,)


def test_the_config_names_the_adapter_beside_it(tmp_path: Path) -> None:
    path = saved(tmp_path, linear())
    assert read(path / "adapter_config.json").modules == (Q,)


def test_dora_magnitudes_are_kept_as_they_are(tmp_path: Path) -> None:
    m = drawn(OUT)
    path = saved(tmp_path, {**linear(), f"{Q}.m": m}, fine_tune_type="dora")
    magnitude = read(path).tensors[TensorKey(Q, Role.MAGNITUDE)]
    np.testing.assert_array_equal(magnitude.numpy(), m)


def test_unsloth_factors_are_weights_of_linear_layers(tmp_path: Path) -> None:
    a, b = drawn(R, IN), drawn(OUT, R)
    path = saved(tmp_path, {f"{Q}.lora_a.weight": a, f"{Q}.lora_b.weight": b})
    adapter = read(path)
    same(dense(adapter)[Q], 20.0 * (b.astype(float) @ a))
    assert "(r, in)" in adapter.provenance.notes[0]


def test_square_factors_are_turned_too(tmp_path: Path) -> None:
    a, b = drawn(R, R), drawn(R, R, seed=1)
    path = saved(tmp_path, {f"{Q}.lora_a": a, f"{Q}.lora_b": b})
    same(dense(read(path))[Q], 20.0 * (a.astype(float) @ b).T)


def test_factors_of_another_orientation_contradict_the_rank(tmp_path: Path) -> None:
    path = saved(tmp_path, {f"{Q}.lora_a": drawn(R, IN), f"{Q}.lora_b": drawn(IN, R)})
    summary = adapterkit.inspect(path)
    assert f"rank {R}" in summary.problems[-1]
    with pytest.raises(adapterkit.FormatError):
        adapterkit.convert(path, tmp_path / "out")


VLM = {f"{Q}.A": drawn(IN, R), f"{Q}.B": drawn(R, OUT)}


def test_mlx_vlm_needs_its_scale_to_be_given(tmp_path: Path) -> None:
    save_file(VLM, tmp_path / "adapters.safetensors")
    config = {"rank": R, "alpha": 0.5, "dropout": 0.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert detect(tmp_path).name == "mlx"
    with pytest.raises(adapterkit.UnsupportedError, match=r"--alpha 2\), .*--alpha 0.5\)"):
        read(tmp_path)
    want = 0.5 * (VLM[f"{Q}.A"].astype(float) @ VLM[f"{Q}.B"]).T
    same(dense(read(tmp_path, alpha=2.0))[Q], want)


def test_a_bare_file_needs_its_scale_to_be_given(tmp_path: Path) -> None:
    save_file(linear(), tmp_path / "adapters.safetensors")
    assert detect(tmp_path / "adapters.safetensors").name == "mlx"
    with pytest.raises(adapterkit.UnsupportedError, match="holds no scale"):
        read(tmp_path)
    assert read(tmp_path, alpha=8.0).scales[Q] == 2.0


def test_alpha_beside_scale_is_ambiguous_before_num_layers_had_its_name(tmp_path: Path) -> None:
    parameters = {"scale": 10.0, "alpha": 16.0}
    path = saved(tmp_path, linear(), parameters=parameters)
    assert read(path).scales[Q] == 10.0
    config = json.loads((path / "adapter_config.json").read_text())
    config["lora_layers"] = config.pop("num_layers")
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(adapterkit.UnsupportedError, match=r"--alpha 160\).*--alpha 40\)"):
        read(path)
    assert read(path, alpha=160.0).scales[Q] == 40.0


REFUSED: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], type[Exception], str]] = {
    "full": (linear(), {"fine_tune_type": "full"}, adapterkit.UnsupportedError, "is full"),
    "kind": (linear(), {"fine_tune_type": "oft"}, adapterkit.UnsupportedError, "'oft' is unknown"),
    "weight": (
        {**linear(), "model.norm.weight": drawn(4)},
        {},
        adapterkit.FormatError,
        "model.norm.weight: is no tensor of an adapter",
    ),
    "shape": (
        {f"{Q}.lora_a": drawn(3), f"{Q}.lora_b": drawn(3)},
        {},
        adapterkit.FormatError,
        "no layer of mlx-lm",
    ),
    "flat-experts": (
        {f"{Q}.lora_a": drawn(E * R + 1, IN), f"{Q}.lora_b": drawn(E, OUT, R)},
        {},
        adapterkit.FormatError,
        "3 experts times rank 4",
    ),
    "scale": (
        linear(),
        {"lora_parameters": {"rank": R, "scale": "20"}},
        adapterkit.FormatError,
        r"lora_parameters\.scale: expects a finite number, has '20'",
    ),
    "parameters": (linear(), {"lora_parameters": [8]}, adapterkit.FormatError, "has a list of 1"),
    "rank": (
        linear(),
        {"lora_parameters": {"rank": 2.5, "scale": 1.0}},
        adapterkit.FormatError,
        "rank: expects a whole number from 0 to 1048576, has 2.5",
    ),
    "empty": ({}, {}, adapterkit.FormatError, "holds no tensors"),
}


@pytest.mark.parametrize(("tensors", "config", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_mlx_lm_would_not_load_is_refused(
    tensors: dict[str, np.ndarray],
    config: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        read(saved(tmp_path, tensors, **config))


def test_a_half_alone_is_inspected_and_not_converted(tmp_path: Path) -> None:
    path = saved(tmp_path, {**linear(), "model.layers.1.self_attn.q_proj.lora_a": drawn(IN, R)})
    problem = "model.layers.1.self_attn.q_proj.lora_A: has no lora_B beside it"
    assert problem in adapterkit.inspect(path).problems


def test_embeddings_need_the_base_because_a_tied_one_is_adapted_twice(tmp_path: Path) -> None:
    table = "model.embed_tokens"
    a, b = drawn(64, R), drawn(R, IN)
    path = saved(tmp_path / "mlx", {f"{table}.lora_a": a, f"{table}.lora_b": b})
    with pytest.raises(adapterkit.BaseRequiredError, match="tied"):
        read(path)
    untied = hf(tmp_path / "untied", LlamaConfig(vocab_size=64, tie_word_embeddings=False))
    tied = hf(tmp_path / "tied", LlamaConfig(vocab_size=64, tie_word_embeddings=True))
    change = 20.0 * a.astype(float) @ b
    plain = dense(read(path, base=untied))
    same(plain[table].T, change)
    assert plain.keys() == {table}
    both = dense(read(path, base=tied))
    same(both[table].T, change)
    same(both["lm_head"], change)


def test_dora_of_an_embedding_is_refused(tmp_path: Path) -> None:
    table = "model.embed_tokens"
    tensors = {f"{table}.lora_a": drawn(64, R), f"{table}.lora_b": drawn(R, IN)}
    path = saved(tmp_path / "mlx", {**tensors, f"{table}.m": drawn(64)}, fine_tune_type="dora")
    untied = hf(tmp_path / "untied", LlamaConfig(vocab_size=64, tie_word_embeddings=False))
    with pytest.raises(adapterkit.UnsupportedError, match="for every token"):
        read(path, base=untied)


def stack(block: str) -> dict[str, np.ndarray]:
    sizes = {"gate_proj": (OUT, IN), "up_proj": (OUT, IN), "down_proj": (IN, OUT)}
    tensors: dict[str, np.ndarray] = {}
    for seed, (leaf, (rows, columns)) in enumerate(sizes.items()):
        tensors[f"{block}.{leaf}.lora_a"] = drawn(E, R, columns, seed=seed)
        tensors[f"{block}.{leaf}.lora_b"] = drawn(E, rows, R, seed=seed)
    return tensors


def change(tensors: dict[str, np.ndarray], module: str) -> np.ndarray:
    return 20.0 * tensors[f"{module}.lora_b"].astype(float) @ tensors[f"{module}.lora_a"]


def test_experts_one_by_one(tmp_path: Path) -> None:
    block = "model.layers.1.mlp.switch_mlp"
    tensors = stack(block)
    found = dense(read(saved(tmp_path, tensors), moe_layout="experts"))
    assert len(found) == 3 * E
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        for expert in range(E):
            name = f"model.layers.1.mlp.experts.{expert}.{leaf}"
            want = change(tensors, f"{block}.{leaf}")[expert]
            same(found[name], want)


def test_experts_fused_as_transformers_5_holds_them(tmp_path: Path) -> None:
    block = "model.layers.1.mlp.switch_mlp"
    tensors = stack(block)
    found = dense(read(saved(tmp_path, tensors)))
    gate, up = (change(tensors, f"{block}.{leaf}") for leaf in ("gate_proj", "up_proj"))
    want = np.concatenate([gate, up], axis=1)
    experts = "model.layers.1.mlp.experts"
    same(found[f"{experts}.gate_up_proj"], want)
    down = change(tensors, f"{block}.down_proj")
    same(found[f"{experts}.down_proj"], down)
    assert found.keys() == {f"{experts}.gate_up_proj", f"{experts}.down_proj"}


def test_mixtral_calls_its_experts_otherwise(tmp_path: Path) -> None:
    block = "model.layers.0.block_sparse_moe"
    router = {f"{block}.gate.lora_a": drawn(IN, R), f"{block}.gate.lora_b": drawn(R, E)}
    tensors = {**stack(f"{block}.switch_mlp"), **router}
    path = saved(tmp_path, tensors)
    single = dense(read(path, moe_layout="experts"))
    for leaf, name in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        want = change(tensors, f"{block}.switch_mlp.{leaf}")[2]
        same(single[f"{block}.experts.2.{name}"], want)
    assert f"{block}.gate" in single
    fused = dense(read(path))
    assert fused.keys() == {
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }


def test_the_base_says_how_experts_are_spelled(tmp_path: Path) -> None:
    path = saved(tmp_path / "mlx", stack("model.layers.0.mlp.switch_mlp"))
    old = Qwen3MoeConfig(num_experts=E)
    base = hf(tmp_path / "new", old)
    assert "model.layers.0.mlp.experts.down_proj" in read(path, base=base).modules
    document = json.loads((tmp_path / "new" / "config.json").read_text())
    document["transformers_version"] = "4.57.1"
    (tmp_path / "old.json").write_text(json.dumps(document))
    modules = read(path, base=open_base(tmp_path / "old.json")).modules
    assert "model.layers.0.mlp.experts.0.down_proj" in modules


def test_experts_of_older_files_are_unflattened_expert_by_expert(tmp_path: Path) -> None:
    tensors = stack("model.layers.0.mlp.switch_mlp")
    flat = {
        name: x.reshape(-1, x.shape[-1]) if name.endswith("lora_a") else x
        for name, x in tensors.items()
    }
    new, old = read(saved(tmp_path / "new", tensors)), read(saved(tmp_path / "old", flat))
    for module, update in dense(old).items():
        same(update, dense(new)[module])
    assert any("0.28.3" in note for note in old.provenance.notes)
    assert not new.provenance.notes


def test_stacks_of_unknown_names_stay_as_they_are(tmp_path: Path) -> None:
    module = "model.layers.0.feed_forward.experts.gate_proj"
    tensors = {f"{module}.lora_a": drawn(E, R, IN), f"{module}.lora_b": drawn(E, OUT, R)}
    assert dense(read(saved(tmp_path, tensors)))[module].shape == (E, OUT, IN)


NAMES = {
    "model.h.0.attn.c_attn": "transformer.h.0.attn.c_attn",
    "model.h.3.attention.query_key_value": "gpt_neox.layers.3.attention.query_key_value",
    "language_model.model.layers.0.self_attn.q_proj": (
        "model.language_model.layers.0.self_attn.q_proj"
    ),
    "model.layers.0.mlp.gate_up_proj": "model.layers.0.mlp.gate_up_proj",
}


@pytest.mark.parametrize(("mlx", "name"), NAMES.items(), ids=NAMES)
def test_modules_get_the_names_of_transformers(mlx: str, name: str, tmp_path: Path) -> None:
    assert read(saved(tmp_path, linear(mlx))).modules == (name,)


def test_mixtral_is_not_taken_for_another_family(tmp_path: Path) -> None:
    base = hf(tmp_path / "base", MixtralConfig(num_local_experts=E))
    path = saved(tmp_path / "mlx", stack("model.layers.0.block_sparse_moe.switch_mlp"))
    assert "model.layers.0.mlp.experts.down_proj" in read(path, base=base).modules


def test_strangers_are_not_claimed(tmp_path: Path) -> None:
    cases: dict[str, dict[str, np.ndarray]] = {
        "weights": {"model.layers.0.mlp.up_proj.weight": drawn(2, 2)},
        "torchtune": {"layers.0.attn.q_proj.lora_a.weight": drawn(2, 2)},
        "unnumbered": {"fc.lora_a": drawn(2, 2), "fc.lora_b": drawn(2, 2)},
    }
    for name, tensors in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        assert not is_mlx(tmp_path / f"{name}.safetensors"), name
    assert not is_mlx(tmp_path)
    assert not is_mlx(tmp_path / "nothing")


FIXTURES = Path(__file__).parents[2] / "fixtures"
HOSTILE = {
    "experts-do-not-divide": "3 experts times rank 2",
    "full-fine-tune": "fine_tune_type is full",
    "half-missing": "model.layers.0.self_attn.q_proj.lora_A: has no lora_B beside it",
    "not-an-adapter-tensor": "model.norm.weight: is no tensor of an adapter",
    "not-turned": "ranks disagree, A is [6, 2], B is [2, 4]",
    "old-alpha": "choose with --alpha",
    "scale-is-text": "lora_parameters.scale: expects a finite number, has '20'",
}


@pytest.mark.parametrize(("name", "message"), HOSTILE.items(), ids=HOSTILE)
def test_hostile_fixtures_are_refused_and_nothing_is_written(
    name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(adapterkit.AdapterKitError) as caught:
        adapterkit.convert(FIXTURES / "hostile" / "mlx" / name, tmp_path / "out")
    assert message in str(caught.value)
    assert caught.value.exit_code in {3, 4}
    assert not (tmp_path / "out").exists()


def test_every_hostile_fixture_is_tested() -> None:
    assert {path.name for path in (FIXTURES / "hostile" / "mlx").iterdir()} == HOSTILE.keys()


def test_both_layouts_of_experts_hold_the_same_update() -> None:
    new, old = (read(FIXTURES / "mlx" / name) for name in ("experts", "experts-flat"))
    assert dense(new).keys() == dense(old).keys()
    for module, update in dense(new).items():
        assert update.any()
        same(update, dense(old)[module])


B0 = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(4)]
TARGETS: dict[str, tuple[list[str], int | None, tuple[int, list[str]]]] = {
    "all": (B0, 4, (4, ["self_attn.q_proj"])),
    "last": (B0[2:], 4, (2, ["self_attn.q_proj"])),
    "first": (B0[:2], 4, (4, B0[:2])),
    "hole": ([B0[0], B0[2], B0[3]], 4, (4, [B0[0], B0[2], B0[3]])),
    "count-unknown": (B0, None, (-1, ["self_attn.q_proj"])),
    "last-of-unknown": (B0[2:], None, (-1, B0[2:])),
    "outside": ([*B0, "lm_head"], 4, (4, ["self_attn.q_proj", "lm_head"])),
    "uneven": (
        [*B0[2:], "model.layers.3.mlp.up_proj"],
        4,
        (4, ["model.layers.2.self_attn.q_proj", "model.layers.3.mlp.up_proj", B0[3]]),
    ),
}


@pytest.mark.parametrize(("modules", "layers", "want"), TARGETS.values(), ids=TARGETS)
def test_keys_are_relative_where_they_say_it_all(
    modules: list[str], layers: int | None, want: tuple[int, list[str]]
) -> None:
    assert targeting(modules, layers) == want


def test_arrays_of_numpy_are_read_as_mlx_examples_saved_them(tmp_path: Path) -> None:
    """Until the spring of 2024 there was no config, so the scale is asked for."""
    tensors = linear()
    np.savez(tmp_path / "adapters.npz", **tensors)
    for path in (tmp_path, tmp_path / "adapters.npz"):
        assert detect(path).name == "mlx"
        with pytest.raises(adapterkit.UnsupportedError, match="scale times rank with --alpha"):
            read(path)
        want = 2.0 * (tensors[f"{Q}.lora_a"].astype(float) @ tensors[f"{Q}.lora_b"]).T
        same(dense(read(path, alpha=2.0 * R))[Q], want)


def test_weights_tell_a_config_that_has_the_fields_of_two_formats(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", linear(), peft_type="LORA", r=R, lora_alpha=8)
    assert detect(path).name == "mlx"
    assert detect(path / "adapters.safetensors").name == "mlx"
    (path / "adapters.safetensors").rename(path / "adapter_model.safetensors")
    assert detect(path).name == "peft"
