"""MLX adapters are read as mlx-lm applies them, and refused where a file does not say how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dense_updates import dense
from mlx_files import FIXTURES, IN, OUT, E, Q, R, drawn, hf, linear, read, same, saved, stack
from safetensors.numpy import save_file
from transformers import LlamaConfig, MixtralConfig

import adapterkit
from adapterkit.formats.mlx.config import targeting
from adapterkit.formats.mlx.probe import is_mlx
from adapterkit.keys import Role, TensorKey
from adapterkit.registry import detect


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
