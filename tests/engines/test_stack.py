"""AdapterStack: what an app holds at run time; the engine proves that a stack is a sum."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from engine import (
    convert_adapter,
    engine_logprobs,
    family_row,
    make_adapter,
    make_base,
    max_kl,
)
from terminal import PEFT, ROOT, invoke

import adapterkit
from adapterkit import (
    AdapterIncompatibleError,
    AdapterLoadFailedError,
    AdapterNotFoundError,
    AdapterStack,
    StackError,
)
from adapterkit.containers.gguf import read_gguf, write_gguf
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

TINY, WEAK, BASE = PEFT / "tiny", PEFT / "tiny-weak", PEFT / "base"
CODES = ROOT / "fixtures" / "validation"


def test_two_adapters_in_llama_cpp_give_the_logits_of_the_stack_as_one(tmp_path: Path) -> None:
    base = make_base(family_row("llama"), tmp_path)
    one = make_adapter(base, tmp_path / "one", r=2)
    two = make_adapter(base, tmp_path / "two", seed=7, target_modules=["q_proj", "down_proj"])
    scales = {"one": 0.7, "two": -1.25}
    for tuned, name in ((one, "one"), (two, "two")):
        convert_adapter(tuned.path, base, tmp_path / f"{name}.gguf")
    prompts = [[5, 9, 300], [7]]
    loaded = [(tmp_path / f"{name}.gguf", scale) for name, scale in scales.items()]
    together = engine_logprobs(base.gguf, prompts, loaded)
    for suffix in (".gguf", ""):
        stack = AdapterStack(base.gguf)
        for name, scale in scales.items():
            stack.load(tmp_path / f"{name}{suffix}", scale=scale)
        made = tmp_path / f"combined{suffix or '-peft'}.gguf"
        adapterkit.write(stack.combined(), made, base=base.gguf)
        answer = engine_logprobs(base.gguf, prompts, [(made, 1.0)])
        assert max_kl(together, answer) < base.tolerance
    backwards = engine_logprobs(base.gguf, prompts, loaded[::-1])
    assert max_kl(together, backwards) < base.tolerance
    assert max_kl(together, engine_logprobs(base.gguf, prompts)) > 1e-3


def update(adapter: adapterkit.AdapterTensorSet, module: str) -> np.ndarray:
    (pair,) = (pair for pair in adapter.pairs() if pair.module == module)
    return pair.scale * pair.b.numpy().astype(float) @ pair.a.numpy()


def test_combined_is_the_sum_whatever_the_order() -> None:
    made = []
    for order in ((TINY, WEAK), (WEAK, TINY)):
        stack = AdapterStack(BASE)
        for path in order:
            stack.load(path, scale=0.5 if path is TINY else 2.0)
        made.append(stack.combined())
    module = "model.layers.1.mlp.down_proj"
    wanted = 0.5 * update(adapterkit.read(TINY), module) + 2 * update(adapterkit.read(WEAK), module)
    for combined in made:
        np.testing.assert_allclose(update(combined, module), wanted, rtol=1e-6, atol=1e-9)


def test_what_is_loaded_can_be_listed_scaled_and_unloaded() -> None:
    stack = AdapterStack(BASE)
    assert stack.load(TINY) == "tiny"
    assert stack.load(TINY, name="again", scale=0) == "again"
    assert [(m.name, m.scale) for m in stack.list()] == [("tiny", 1.0), ("again", 0.0)]
    assert stack.bytes == 2 * stack.list()[0].bytes == 2 * 4 * adapterkit.read(TINY).parameters
    assert stack.conflicts() == ()
    stack.set_scale("again", -1)
    found = stack.conflicts()
    assert len(found) == 6
    assert all(conflict.cancels for conflict in found)
    assert found[0].cosine == pytest.approx(-1)
    stack.set_scale("again", 1)
    assert not any(conflict.cancels for conflict in stack.conflicts())
    stack.unload("tiny")
    assert "tiny" not in stack
    assert len(stack) == 1
    stack.clear()
    assert stack.list() == ()


def test_errors_have_stable_codes(tmp_path: Path) -> None:
    stack = AdapterStack(BASE)
    stack.load(TINY)
    with pytest.raises(AdapterNotFoundError, match="no such file") as missing:
        stack.load(tmp_path / "nothing")
    with pytest.raises(AdapterNotFoundError, match="loaded: tiny"):
        stack.set_scale("other", 1)
    with pytest.raises(AdapterNotFoundError):
        stack.unload("other")
    with pytest.raises(AdapterLoadFailedError, match="another name"):
        stack.load(TINY)
    with pytest.raises(AdapterLoadFailedError, match="no finite number"):
        stack.load(TINY, name="x", scale=float("nan"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(AdapterLoadFailedError) as broken:
        stack.load(tmp_path / "broken.gguf")
    with pytest.raises(AdapterIncompatibleError, match="64 x 48") as wide:
        AdapterStack(PEFT / "wider-base").load(TINY)
    with pytest.raises(AdapterIncompatibleError, match="qwen2"):
        AdapterStack(BASE).load(CODES / "AK301" / "adapter.gguf")
    with pytest.raises(AdapterIncompatibleError, match="is no module"):
        AdapterStack(CODES / "bases" / "llama").load(CODES / "AK303")
    errors: list[StackError] = [missing.value, wide.value, broken.value]
    assert [error.code for error in errors] == ["not-found", "incompatible", "load-failed"]
    assert [member.name for member in stack.list()] == ["tiny"]


def test_what_is_no_sum_cannot_be_combined() -> None:
    stack = AdapterStack(BASE)
    with pytest.raises(AdapterLoadFailedError, match="no active adapter"):
        stack.combined()
    stack.load(PEFT / "dora")
    with pytest.raises(AdapterIncompatibleError, match="no pair of factors"):
        stack.combined()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for source, name in ((TINY, "a.gguf"), (WEAK, "b.gguf")):
        adapterkit.convert(source, name, base=BASE)
    return tmp_path


@pytest.mark.usefixtures("files")
def test_settings_of_every_engine() -> None:
    def printed(*arguments: str) -> str:
        result = invoke("stack", *arguments)
        assert result.exit_code == 0, result.output
        return result.stdout.strip()

    assert printed("a.gguf", "b.gguf", "--for", "llama.cpp") == "--lora a.gguf,b.gguf"
    scaled = printed("a.gguf@0.7", "b.gguf@-1", "--for", "llama.cpp")
    assert scaled == "--lora-scaled a.gguf:0.7,b.gguf:-1"
    server = printed("a.gguf@0.7", "b.gguf", "--for", "llama-server").splitlines()
    assert server[0] == "llama-server --lora a.gguf --lora b.gguf --lora-init-without-apply"
    wanted = [{"id": 0, "scale": 0.7}, {"id": 1, "scale": 1.0}]
    assert json.loads(server[1].removeprefix("POST /lora-adapters ")) == wanted
    assert printed("a.gguf", "--for", "ollama@0.33") == "FROM <base>\nADAPTER a.gguf"
    vllm = printed(str(TINY), "--for", "vllm")
    assert vllm == f"--enable-lora --max-lora-rank 8 --lora-modules tiny={TINY}"
    sglang = printed(str(TINY), "--for", "sglang")
    assert sglang == f"--lora-paths tiny={TINY} --lora-strict-loading"
    result = json.loads(printed("a.gguf@0.5", "--for", "llama.cpp", "--json"))
    assert result["adapters"] == [{"name": "a", "path": "a.gguf", "scale": 0.5}]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("a.gguf", "b.gguf", "--for", "ollama@0.33"), 4),
        (("a.gguf@0.5", "--for", "ollama@0.33"), 4),
        ((str(TINY), "--for", "llama.cpp"), 4),
        (("a.gguf", "--for", "vllm"), 4),
        ((f"{TINY}@2", str(WEAK), "--for", "sglang"), 4),
        (("nothing.gguf", "--for", "llama.cpp"), 3),
        (("a.gguf", "--for", "hal"), 2),
        (("a.gguf", "--base", str(PEFT / "wider-base"), "--for", "llama.cpp"), 4),
    ],
)
@pytest.mark.usefixtures("files")
def test_what_an_engine_cannot_load_is_refused(arguments: tuple[str, ...], code: int) -> None:
    result = invoke("stack", *arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""


@pytest.mark.usefixtures("files")
def test_cancelling_adapters_are_reported() -> None:
    result = invoke("stack", "a.gguf@1", "a.gguf@-1", "--for", "llama.cpp")
    assert result.exit_code == 3  # one name twice
    result = invoke("stack", "a.gguf@1", "b.gguf@-4", "--for", "llama.cpp")
    assert result.exit_code == 0
    assert "a and b cancel each other" in result.stderr


def test_folders_tell_apart_what_file_names_do_not(tmp_path: Path) -> None:
    for run in ("run1", "run2"):
        shutil.copytree(TINY, tmp_path / run / "checkpoint-500")
    paths = [tmp_path / run / "checkpoint-500" for run in ("run1", "run2")]
    stack = AdapterStack()
    assert [stack.load(path) for path in paths] == ["checkpoint-500", "run2-checkpoint-500"]
    result = invoke("stack", f"style={paths[0]}", paths[1], "--for", "vllm")
    assert result.exit_code == 0
    assert f"style={paths[0]} checkpoint-500={paths[1]}" in result.stdout
    assert "one of them a request" in result.stderr


def test_a_directory_is_called_what_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("v1.5", "a,b", "here"):
        shutil.copytree(TINY, tmp_path / name)
    monkeypatch.chdir(tmp_path / "here")
    result = invoke("stack", "../v1.5", "../a,b", ".", "--for", "vllm")
    assert result.exit_code == 0
    named = shlex.split(result.stdout)[-3:]
    assert named[0] == "v1.5=../v1.5"
    assert json.loads(named[1]) == {"name": "a,b", "path": "../a,b"}  # vLLM parts at a comma
    assert named[2] == "here=."


def test_the_command_that_makes_one_of_several_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "the other"):
        shutil.copytree(TINY, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    result = invoke("stack", "one", "the other@0.5", "--for", "vllm")
    assert result.exit_code == 4
    (advised,) = re.findall(r"\(adapterkit (.*)\)", result.stderr)
    assert invoke(*shlex.split(advised)).exit_code == 0
    halved = adapterkit.merge_files(["the other"], "wanted", weights=[0.5])
    assert adapterkit.diff("combined", halved.destination).equal


def test_a_stray_tensor_is_left_out_where_that_is_allowed(tmp_path: Path) -> None:
    adapterkit.convert(TINY, tmp_path / "a.gguf", base=BASE)
    file = read_gguf(tmp_path / "a.gguf")
    stray = {"rope_freqs.weight": LazyTensor.of(np.ones(4, np.float32))}
    write_gguf(tmp_path / "b.gguf", file.typed(), {**file.tensors, **stray})
    arguments = ("convert", tmp_path / "b.gguf", "-o", tmp_path / "c.gguf", "--base", BASE)
    refused = invoke(*arguments)
    assert refused.exit_code == 4
    assert "leave it out with --allow-lossy" in refused.stderr
    allowed = invoke(*arguments, "--allow-lossy")
    assert allowed.exit_code == 0
    assert "rope_freqs.weight" in allowed.stderr
    assert read_gguf(tmp_path / "c.gguf").tensors.keys() == file.tensors.keys()
