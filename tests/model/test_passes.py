"""Every pass keeps its promise, and says what it did."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from adapterkit import (
    AdapterTensorSet,
    LazyTensor,
    Loss,
    LossyConversionError,
    Role,
    TensorKey,
    UsageError,
    convert,
    read,
    write,
)
from adapterkit.base import open_base
from adapterkit.passes.protocol import Context
from adapterkit.passes.registry import PASSES, apply, by_name

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit import BaseModel
    from adapterkit.passes.protocol import Passed

ROWS, WIDTH, RANK = 70, 8, 2
TABLE, OUTPUT, LAYER = "model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.fixture
def adapter() -> AdapterTensorSet:
    arrays = {
        TensorKey(TABLE, Role.EMBEDDING_A): drawn(RANK, ROWS),
        TensorKey(TABLE, Role.EMBEDDING_B): drawn(WIDTH, RANK),
        TensorKey(OUTPUT, Role.LORA_A): drawn(RANK, WIDTH),
        TensorKey(OUTPUT, Role.LORA_B): drawn(ROWS, RANK),
        TensorKey(LAYER, Role.LORA_A): drawn(4, WIDTH),
        TensorKey(LAYER, Role.LORA_B): drawn(WIDTH, 4),
    }
    return AdapterTensorSet(
        tensors={key: LazyTensor.of(array) for key, array in arrays.items()},
        scales={TABLE: 0.5, OUTPUT: 2.0, LAYER: 2.0},
    )


def base(folder: Path, rows: int) -> BaseModel:
    return open_base(written(folder, rows))


def written(folder: Path, rows: int, cls: str = "LlamaForCausalLM") -> Path:
    config = {
        "architectures": [cls],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": rows,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def dense(adapter: AdapterTensorSet) -> dict[str, np.ndarray]:
    """Return ΔW of every module, (rows, width) of tables too."""
    updates = {}
    for pair in adapter.pairs():
        update = pair.scale * pair.b.numpy().astype(float) @ pair.a.numpy().astype(float)
        updates[pair.module] = update.T if pair.embedding else update
    return updates


def zeroed(adapter: AdapterTensorSet, rows: int) -> AdapterTensorSet:
    """Return the adapter without an update in the rows from `rows` on."""
    tensors = dict(adapter.tensors)
    for key, axis in ((TensorKey(TABLE, Role.EMBEDDING_A), 1), (TensorKey(OUTPUT, Role.LORA_B), 0)):
        array = tensors[key].numpy().copy()
        (array[:, rows:] if axis else array[rows:])[...] = 0
        tensors[key] = LazyTensor.of(array)
    return adapter.replace(tensors=tensors)


def fitted(adapter: AdapterTensorSet, model: BaseModel, *, allow_lossy: bool = False) -> Passed:
    return apply(["vocabulary"], adapter, Context(base=model, allow_lossy=allow_lossy))


def test_passes_are_named_and_promise_something() -> None:
    names = [
        "declaration",
        "pooling",
        "initialisation",
        "dora",
        "copies",
        "vocabulary",
        "uniform",
        "stacked",
        "names",
        "loaded-names",
        "drop",
    ]
    assert [known.name for known in PASSES] == names
    assert all(known.promise for known in PASSES)
    with pytest.raises(UsageError, match="known: declaration, pooling"):
        by_name("nonsense")


def test_modules_are_named_as_the_class_has_them(adapter: AdapterTensorSet, tmp_path: Path) -> None:
    headless = open_base(written(tmp_path, ROWS, "LlamaModel"))
    done = apply(["names"], adapter, Context(base=headless))
    names = {name: name.removeprefix("model.") for name in adapter.modules}
    before, after = dense(adapter), dense(done.adapter)
    assert after.keys() == set(names.values())
    for old, new in names.items():
        np.testing.assert_array_equal(after[new], before[old])
    assert "embed_tokens" in str(done.notes[0])


def test_every_field_that_names_modules_has_the_new_names(
    adapter: AdapterTensorSet, tmp_path: Path
) -> None:
    headless = open_base(written(tmp_path, ROWS, "LlamaModel"))
    told = adapter.replace(
        tied={TABLE: (OUTPUT,)},
        token_indices={TABLE: (1, 2)},
        unstored={"lora_bias": (LAYER,)},
        rank_conflicts={LAYER: (2, 4)},
    )
    done = apply(["names"], told, Context(base=headless)).adapter
    table, layer = TABLE.removeprefix("model."), LAYER.removeprefix("model.")
    assert done.tied == {table: (OUTPUT,)}
    assert done.token_indices == {table: (1, 2)}
    assert done.unstored == {"lora_bias": (layer,)}
    assert done.rank_conflicts == {layer: (2, 4)}


@pytest.mark.parametrize("name", [known.name for known in PASSES])
def test_what_has_nothing_to_change_comes_back_the_same(
    name: str, adapter: AdapterTensorSet
) -> None:
    done = by_name(name).change(adapter, Context())
    assert (done.notes, done.losses) == ((), ())
    for module, update in dense(done.adapter).items():
        np.testing.assert_allclose(update, dense(adapter)[module], rtol=1e-6, atol=1e-7)


def test_rows_without_an_update_are_cut(adapter: AdapterTensorSet, tmp_path: Path) -> None:
    whole = zeroed(adapter, 64)
    done = fitted(whole, base(tmp_path, 64))
    assert len(done.notes) == 2
    assert done.losses == ()
    for module, update in dense(done.adapter).items():
        np.testing.assert_array_equal(update, dense(whole)[module][: len(update)])
        assert not dense(whole)[module][len(update) :].any()
        assert len(update) == (WIDTH if module == LAYER else 64)


def test_rows_that_the_base_adds_have_no_update(adapter: AdapterTensorSet, tmp_path: Path) -> None:
    done = fitted(adapter, base(tmp_path, 80))
    assert done.losses == ()
    for module, before in dense(adapter).items():
        after = dense(done.adapter)[module]
        np.testing.assert_array_equal(after[: len(before)], before)
        assert not after[len(before) :].any()
        assert len(after) == (WIDTH if module == LAYER else 80)


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_rows_with_an_update_leave_only_where_that_is_allowed(
    value: float, adapter: AdapterTensorSet, tmp_path: Path
) -> None:
    tensors = dict(zeroed(adapter, 64).tensors)
    key = TensorKey(OUTPUT, Role.LORA_B)
    array = tensors[key].numpy().copy()
    array[69, 1] = value
    grown = adapter.replace(tensors=tensors | {key: LazyTensor.of(array)})
    model = base(tmp_path, 64)
    done = fitted(grown, model)
    assert [loss.subject for loss in done.losses] == [OUTPUT]
    assert done.adapter.tensors[key].shape == (70, RANK)
    assert done.adapter.tensors[TensorKey(TABLE, Role.EMBEDDING_A)].shape == (RANK, 64)
    cut = fitted(grown, model, allow_lossy=True)
    assert cut.losses == done.losses
    assert cut.adapter.tensors[key].shape == (64, RANK)


def test_exactly_what_losses_name_is_dropped(adapter: AdapterTensorSet) -> None:
    keys = tuple(key for key in adapter.tensors if key.module == OUTPUT)
    losses = (Loss("one", OUTPUT, "cannot be held", keys), Loss("two", "x", "says nothing"))
    done = by_name("drop").change(adapter, Context(losses=losses))
    assert list(done.adapter.tensors) == [key for key in adapter.tensors if key not in keys]
    assert all(done.adapter.tensors[key] is adapter.tensors[key] for key in done.adapter.tensors)
    assert done.losses == losses


def test_one_rank_and_one_scale_are_the_same_updates(adapter: AdapterTensorSet) -> None:
    done = by_name("uniform").change(adapter, Context()).adapter
    assert {(pair.rank, pair.scale) for pair in done.pairs()} == {(4, 2.0)}
    for module, update in dense(done).items():
        np.testing.assert_allclose(update, dense(adapter)[module], rtol=1e-6, atol=1e-7)


def test_peft_holds_a_vocabulary_that_grew_and_others_ask(
    adapter: AdapterTensorSet, tmp_path: Path
) -> None:
    base(tmp_path, 64)
    config, grown = tmp_path / "config.json", tmp_path / "grown"
    write(adapter, grown)
    kept = convert(grown, tmp_path / "kept", base=config, allow_lossy=True)
    assert kept.losses == ()
    for module, update in dense(read(tmp_path / "kept")).items():
        np.testing.assert_array_equal(update, dense(read(grown))[module])
    with pytest.raises(LossyConversionError, match="70 rows are more than the base's 64"):
        convert(grown, tmp_path / "x.gguf", base=config)
    assert not (tmp_path / "x.gguf").exists()
    cut = convert(grown, tmp_path / "x.gguf", base=config, allow_lossy=True)
    assert [loss.code for loss in cut.losses] == ["vocabulary", "vocabulary"]
