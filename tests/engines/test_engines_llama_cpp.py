"""`validate --target llama.cpp` says what llama.cpp does, case by case, good files and broken ones.

The engine runs in a process of its own: it accepts and applies a file, accepts it and answers as
the base model, refuses it, or takes the process down.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from engine import (
    BaseFixture,
    EngineError,
    convert_adapter,
    engine_logprobs,
    family_row,
    make_adapter,
    make_base,
    max_kl,
)

from adapterkit import Verdict, load_target, validate
from adapterkit.architectures import LLAMA_CPP
from adapterkit.containers.gguf import read_gguf

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.engine

PROMPTS = [[5, 9, 300], [7]]
SAME = 1e-12
Tensors = dict[str, np.ndarray[Any, Any]]


@dataclass
class Content:
    """What is written into an adapter file."""

    tensors: Tensors
    architecture: str
    alpha: tuple[str, float] = ("float32", 8.0)


@dataclass(frozen=True)
class Bench:
    """A base, a sound adapter of it, and what the engine answers without and with that."""

    base: BaseFixture
    adapter: Path
    plain: np.ndarray[Any, Any]
    adapted: np.ndarray[Any, Any]


def prepared(name: str, folder: Path, **lora: Any) -> Bench:
    base = make_base(family_row(name), folder)
    tuned = make_adapter(base, folder / "peft", **lora)
    convert_adapter(tuned.path, base, folder / "sound.gguf")
    plain = engine_logprobs(base.gguf, PROMPTS)
    adapted = engine_logprobs(base.gguf, PROMPTS, [(folder / "sound.gguf", 1.0)])
    return Bench(base, folder / "sound.gguf", plain, adapted)


def content_of(bench: Bench) -> Content:
    file = read_gguf(bench.adapter)
    tensors = {name: np.array(tensor.numpy()) for name, tensor in file.tensors.items()}
    return Content(tensors, str(file.metadata["general.architecture"]))


def write(content: Content, path: Path) -> None:
    writer = gguf.GGUFWriter(path, content.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    kind, alpha = content.alpha
    getattr(writer, f"add_{kind}")("adapter.lora.alpha", alpha if "float" in kind else int(alpha))
    for name, array in content.tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fate(bench: Bench, path: Path) -> Verdict:
    """Return what the engine does."""
    try:
        answer = engine_logprobs(bench.base.gguf, PROMPTS, [(path, 1.0)])
    except EngineError as error:
        code = re.match(r"llama.cpp ended with (-?\d+)", str(error))
        assert code is not None
        return Verdict.ABORTS if int(code[1]) < 0 else Verdict.REFUSED
    if max_kl(bench.plain, answer) < SAME:
        return Verdict.NOTHING
    return Verdict.APPLIED


def predicted(bench: Bench, path: Path) -> Verdict | None:
    report = validate(path, base=bench.base.gguf, targets=["llama.cpp"])
    (engine,) = report.targets
    assert report.exit_code == (engine.verdict is not Verdict.APPLIED), report.findings
    return engine.verdict


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "gpt2", "phi3", "mixtral"])
def test_no_false_alarm_on_a_sound_adapter(name: str, tmp_path: Path) -> None:
    bench = prepared(name, tmp_path)
    assert max_kl(bench.plain, bench.adapted) > 1e-3
    for base in (bench.base.gguf, bench.base.hf):
        report = validate(bench.adapter, base=base, targets=["llama.cpp"])
        assert report.findings == ()
        assert report.targets[0].verdict is Verdict.APPLIED
        assert report.targets[0].modules
    # The source of the conversion fits too, by its own names.
    report = validate(tmp_path / "peft", base=bench.base.gguf, targets=["llama.cpp", "peft"])
    assert {finding.code for finding in report.findings} == {"LCP001"}


Q, EMBEDDING = "blk.0.attn_q.weight", "token_embd.weight"


def renamed(content: Content, old: str, new: str) -> None:
    content.tensors = {name.replace(old, new): x for name, x in content.tensors.items()}


def replaced(content: Content, change: Callable[[np.ndarray[Any, Any]], Any], *names: str) -> None:
    for name in names or tuple(content.tensors):
        content.tensors[name] = np.ascontiguousarray(change(content.tensors[name]))


def other_architecture(content: Content) -> None:
    content.architecture = "qwen2"


def unknown_architecture(content: Content) -> None:
    content.architecture = "hal"


def other_width(content: Content) -> None:
    replaced(content, lambda x: x[:, :-2], f"{Q}.lora_a")


def other_height(content: Content) -> None:
    replaced(content, lambda x: np.tile(x, (2, 1)), f"{Q}.lora_b")


def missing_layer(content: Content) -> None:
    renamed(content, "blk.1.", "blk.7.")


def unknown_tensor(content: Content) -> None:
    renamed(content, "blk.1.attn_v", "blk.1.attn_w")


def orphan_a(content: Content) -> None:
    del content.tensors[f"{Q}.lora_b"]


def orphan_b(content: Content) -> None:
    del content.tensors[f"{Q}.lora_a"]


def ranks_disagree(content: Content) -> None:
    replaced(content, lambda x: x[:, :-1], f"{Q}.lora_b")


def embedding_ranks_disagree(content: Content) -> None:
    replaced(content, lambda x: x[:, :-1], f"{EMBEDDING}.lora_b")


def no_tensors(content: Content) -> None:
    content.tensors = {}


def zeros(content: Content) -> None:
    replaced(content, np.zeros_like, *(name for name in content.tensors if name.endswith("_b")))


def bad_suffix(content: Content) -> None:
    content.tensors["blk.0.attn_q.bias"] = np.zeros(64, np.float32)


def whole_weight(content: Content) -> None:
    content.tensors["output.weight"] = np.zeros((512, 64), np.float32)


def doubles(content: Content) -> None:
    replaced(content, lambda x: x.astype(np.float64))


def integers(content: Content) -> None:
    replaced(content, lambda x: (10 * x).astype(np.int32))


def whole_alpha(content: Content) -> None:
    content.alpha = ("uint32", 8)


def double_alpha(content: Content) -> None:
    content.alpha = ("float64", 8.0)


def flat_factor(content: Content) -> None:
    replaced(content, lambda x: x[0], f"{Q}.lora_b")


BROKEN: dict[Callable[[Content], None], Verdict] = {
    other_architecture: Verdict.REFUSED,
    unknown_architecture: Verdict.REFUSED,
    other_width: Verdict.REFUSED,
    other_height: Verdict.REFUSED,
    missing_layer: Verdict.REFUSED,
    unknown_tensor: Verdict.REFUSED,
    orphan_a: Verdict.REFUSED,
    orphan_b: Verdict.REFUSED,
    ranks_disagree: Verdict.REFUSED,
    flat_factor: Verdict.REFUSED,
    bad_suffix: Verdict.REFUSED,
    whole_weight: Verdict.REFUSED,
    embedding_ranks_disagree: Verdict.ABORTS,
    doubles: Verdict.ABORTS,
    integers: Verdict.ABORTS,
    whole_alpha: Verdict.ABORTS,
    double_alpha: Verdict.ABORTS,
    no_tensors: Verdict.NOTHING,
    zeros: Verdict.NOTHING,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    targets = ["embed_tokens", "q_proj", "v_proj", "down_proj", "lm_head"]
    return prepared("llama", tmp_path_factory.mktemp("llama"), target_modules=targets)


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_broken_file_does_what_was_predicted(
    change: Callable[[Content], None], llama: Bench, tmp_path: Path
) -> None:
    content, path = content_of(llama), tmp_path / "broken.gguf"
    change(content)
    write(content, path)
    assert (fate(llama, path), predicted(llama, path)) == (BROKEN[change], BROKEN[change])


def test_file_written_by_the_test_itself_is_sound(llama: Bench, tmp_path: Path) -> None:
    content, path = content_of(llama), tmp_path / "same.gguf"
    metadata = read_gguf(llama.adapter).metadata
    content.alpha = ("float32", float(str(metadata["adapter.lora.alpha"])))
    write(content, path)
    assert (fate(llama, path), predicted(llama, path)) == (Verdict.APPLIED, Verdict.APPLIED)
    answer = engine_logprobs(llama.base.gguf, PROMPTS, [(path, 1.0)])
    assert max_kl(llama.adapted, answer) < SAME


def test_norms_are_loaded_and_change_nothing(llama: Bench, tmp_path: Path) -> None:
    content, path = content_of(llama), tmp_path / "norms.gguf"
    metadata = read_gguf(llama.adapter).metadata
    content.alpha = ("float32", float(str(metadata["adapter.lora.alpha"])))
    content.tensors["blk.0.attn_norm.weight"] = np.full(64, 7, np.float32)
    write(content, path)
    assert predicted(llama, path) is Verdict.PARTLY
    answer = engine_logprobs(llama.base.gguf, PROMPTS, [(path, 1.0)])
    assert max_kl(llama.adapted, answer) < SAME


def test_nan_is_loaded_and_poisons_every_answer(llama: Bench, tmp_path: Path) -> None:
    content, path = content_of(llama), tmp_path / "nan.gguf"
    content.tensors[f"{Q}.lora_a"][0, 0] = np.nan
    write(content, path)
    assert predicted(llama, path) is Verdict.GARBAGE
    with pytest.raises(EngineError, match="ended with 1"):
        engine_logprobs(llama.base.gguf, PROMPTS, [(path, 1.0)])


@pytest.mark.parametrize(
    ("tensor", "expected"), [(EMBEDDING, Verdict.ABORTS), ("output.weight", Verdict.REFUSED)]
)
def test_tied_embeddings(tensor: str, expected: Verdict, llama: Bench, tmp_path: Path) -> None:
    base = make_base(family_row("llama-tied"), tmp_path)
    tied = Bench(base, llama.adapter, engine_logprobs(base.gguf, PROMPTS), llama.adapted)
    content, path = content_of(llama), tmp_path / "tied.gguf"
    content.tensors = {name: x for name, x in content.tensors.items() if name.startswith(tensor)}
    write(content, path)
    assert (fate(tied, path), predicted(tied, path)) == (expected, expected)


def fewer_experts(content: Content) -> None:
    replaced(content, lambda x: x[:1], *(name for name in content.tensors if "_exps" in name))


def one_for_all_experts(content: Content) -> None:
    replaced(content, lambda x: x[0], *(name for name in content.tensors if "_exps" in name))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return prepared("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize("change", [fewer_experts, one_for_all_experts])
def test_wrong_number_of_experts_is_loaded_and_read_beyond_its_end(
    change: Callable[[Content], None], mixtral: Bench, tmp_path: Path
) -> None:
    content, path = content_of(mixtral), tmp_path / "experts.gguf"
    change(content)
    write(content, path)
    assert predicted(mixtral, path) is Verdict.GARBAGE
    # What lies behind the factors is chance; that it is not refused is not.
    assert fate(mixtral, path) is not Verdict.REFUSED


def test_the_engine_here_is_the_build_that_the_tables_name() -> None:
    build = f"b{version('xllamacpp').rpartition('.')[2]}"
    assert build == LLAMA_CPP
    assert f"llama.cpp {build} " in load_target("llama.cpp").source


def test_inert_tensors_are_loaded_and_never_applied(tmp_path: Path) -> None:
    inert = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"]
    bench = prepared(
        "deepseek2", tmp_path, target_modules=[*inert, "o_proj"], target_parameters=None
    )
    content, path = content_of(bench), tmp_path / "inert.gguf"
    content.tensors = {name: x for name, x in content.tensors.items() if "attn_output" not in name}
    assert content.tensors
    write(content, path)
    assert (fate(bench, path), predicted(bench, path)) == (Verdict.NOTHING, Verdict.NOTHING)
    assert (fate(bench, bench.adapter), predicted(bench, bench.adapter)) == (
        Verdict.APPLIED,
        Verdict.PARTLY,
    )
