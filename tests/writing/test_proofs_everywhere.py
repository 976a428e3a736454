"""No command that writes an adapter or a model forgets its proof, and engines load it as before."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from engine import (
    AdapterFixture,
    engine_logprobs,
    family_row,
    logprobs,
    make_adapter,
    make_base,
    max_kl,
    prompts_for,
)
from safetensors.numpy import load_file, save_file
from terminal import invoke

import adapterkit
from adapterkit import convert, merge_into, verify
from adapterkit.containers.gguf import read_gguf
from adapterkit.errors import UncheckableError
from adapterkit.stamps import BESIDE, KEY, contents, stamped
from adapterkit_cli.main import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> AdapterFixture:
    folder = tmp_path_factory.mktemp("proofs")
    base = make_base(family_row("llama"), folder)
    return make_adapter(base, folder / "adapter", target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def merged(tuned: AdapterFixture) -> dict[str, Path]:
    """Return the models of both kinds with the adapter merged into them."""
    folder = tuned.path.parent
    paths = {"hf": folder / "merged", "gguf": folder / "merged.gguf"}
    merge_into([tuned.path], tuned.base.hf, paths["hf"])
    merge_into([tuned.path], tuned.base.gguf, paths["gguf"])
    return paths


@dataclass(frozen=True)
class Writer:
    """A command that writes.

    Attributes:
        command: as a certificate has it.
        line: what a user types before `-o DST`.
        suffix: of DST.
        sources: last names of what it is made from.
    """

    command: str
    line: Callable[[AdapterFixture, dict[str, Path]], list[object]]
    sources: tuple[str, ...] = ("adapter",)
    suffix: str = ""


WRITERS = {
    "convert": Writer("convert", lambda t, _: ["convert", t.path, "--to", "peft"]),
    "convert to mlx": Writer(
        "convert", lambda t, _: ["convert", t.path, "--to", "mlx", "--base", t.base.hf]
    ),
    "convert to gguf": Writer(
        "convert", lambda t, _: ["convert", t.path, "--base", t.base.gguf], suffix=".gguf"
    ),
    "compress": Writer("compress", lambda t, _: ["compress", t.path, "--rank", 2]),
    "merge": Writer("merge", lambda t, _: ["merge", t.path, t.path, "--weights", "0.5,0.5"]),
    "merge --into a directory": Writer(
        "merge --into", lambda t, _: ["merge", t.path, "--into", t.base.hf]
    ),
    "merge --into a gguf": Writer(
        "merge --into", lambda t, _: ["merge", t.path, "--into", t.base.gguf], suffix=".gguf"
    ),
    "extract": Writer(
        "extract",
        lambda t, m: ["extract", "--base", t.base.hf, "--tuned", m["hf"]],
        sources=("merged",),
    ),
    "tinylora project": Writer(
        "tinylora project",
        lambda t, _: ["tinylora", "project", t.path, "--base", t.base.hf, "--size", 4],
    ),
}


def writing_commands(group: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield every command of the program that takes `-o DST`, by its full name."""
    if isinstance(group, click.Group):
        context = click.Context(group)
        for inner in group.list_commands(context):
            found = group.get_command(context, inner)
            assert found is not None
            yield from writing_commands(found, f"{name} {inner}".strip())
    elif any(parameter.name == "destination" for parameter in group.params):
        yield name, group


def test_every_command_that_writes_is_in_the_table_and_can_leave_the_proof_out() -> None:
    found = dict(writing_commands(cli))
    assert found.keys() == {each.command.removesuffix(" --into") for each in WRITERS.values()}
    for name, command in found.items():
        assert "--no-proof" in [option for each in command.params for option in each.opts], name


def test_every_function_that_writes_an_adapter_can_leave_it_out() -> None:
    missing = {
        name
        for name in adapterkit.__all__
        if callable(function := getattr(adapterkit, name))
        and {"destination", "force"} <= (taken := set(inspect.signature(function).parameters))
        and not taken & {"proof", "given"}
    }
    # Pages and a bank of reference values are no adapters.
    assert missing == {"write_html", "write_page", "bank"}


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_command_writes_carries_its_proof(
    name: str, tuned: AdapterFixture, merged: dict[str, Path], tmp_path: Path
) -> None:
    writer = WRITERS[name]
    bare, path = tmp_path / f"bare{writer.suffix}", tmp_path / f"made{writer.suffix}"
    line = list(map(str, writer.line(tuned, merged)))
    for arguments in (["-o", str(path)], ["-o", str(bare), "--no-proof"]):
        ran = invoke(*line, *arguments)
        assert ran.exit_code == 0, ran.output
    with pytest.raises(UncheckableError, match="carries no proof"):
        verify(bare)
    # The pack of TinyLoRA holds the time and a random number.
    assert contents(bare).tensors == contents(path).tensors
    assert contents(bare).settings.keys() == contents(path).settings.keys()
    report = verify(path)
    assert (report.sound, report.command) == (True, writer.command)
    assert tuple(report.sources) == writer.sources
    for place in places(path):
        whole = place.read_bytes()
        changed = bytearray(whole)
        changed[len(whole) - 40] ^= 8  # in the tensors, which are last
        place.write_bytes(changed)
        try:
            assert not verify(path).sound, place
        finally:
            place.write_bytes(whole)


def places(path: Path) -> list[Path]:
    """Return the files with tensors."""
    files = path.rglob("*") if path.is_dir() else [path]
    return [file for file in files if file.suffix in {".safetensors", ".gguf", ".pt"}]


# What is said of a model.


def told(path: Path, **given: Any) -> set[tuple[str, str]]:
    return {(change.kind, change.where) for change in verify(path, **given).changes}


@pytest.fixture(params=["hf", "gguf"])
def model(request: pytest.FixtureRequest, merged: dict[str, Path], tmp_path: Path) -> Path:
    """Return a merged model to change."""
    origin = merged[request.param]
    path = tmp_path / origin.name
    (shutil.copytree if origin.is_dir() else shutil.copy)(origin, path)
    return path


def test_a_model_is_held_against_its_adapters_and_its_base(
    model: Path, tuned: AdapterFixture, tmp_path: Path
) -> None:
    base = tuned.base.hf if model.is_dir() else tuned.base.gguf
    report = verify(model, against=tuned.path, base=base)
    assert (report.sound, report.notes, report.format) == (True, (), "model")
    assert report.options["weights"] == "[1.0]"
    # The same update in another format is what was merged, with other bytes.
    convert(tuned.path, tmp_path / "same.gguf", base=tuned.base.gguf, outtype="f16")
    report = verify(model, against=tmp_path / "same.gguf", base=base)
    assert report.sound
    assert "by their sha256" in report.notes[0]
    # Another one is not, and neither is a quarter of it.
    other = make_adapter(tuned.base, tmp_path / "other", seed=5, target_modules=["q_proj"])
    assert told(model, against=other.path) == {("source", str(other.path))}
    weak = tmp_path / "weak"
    shutil.copytree(tuned.path, weak)
    config = json.loads((weak / "adapter_config.json").read_text())
    (weak / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2}))
    assert told(model, against=weak) == {("source", str(weak))}
    swapped = make_base(family_row("llama"), tmp_path / "swapped", seed=3)
    swapped_base = swapped.hf if model.is_dir() else swapped.gguf
    assert told(model, base=swapped_base) == {("base", str(swapped_base))}


def test_a_flipped_byte_of_a_model_names_its_tensor(model: Path) -> None:
    (file,) = places(model)
    whole = bytearray(file.read_bytes())
    if file.suffix == ".gguf":
        name, tensor = list(read_gguf(file).tensors.items())[-1]
    else:
        length = int.from_bytes(whole[:8], "little")
        fields = json.loads(whole[8 : 8 + length])
        fields.pop("__metadata__", None)
        name = max(fields, key=lambda each: fields[each]["data_offsets"])
        tensor = None
    del tensor
    whole[-40] ^= 1
    file.write_bytes(whole)
    assert told(model) == {("tensor", name)}


def test_a_renamed_and_a_dropped_tensor_and_a_setting_of_a_model_are_named(
    merged: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(merged["hf"], model)
    (file,) = places(model)
    tensors = load_file(file)
    gone, old, lost = (
        f"model.{name}.weight"
        for name in ("layers.0.mlp.up_proj", "layers.1.mlp.down_proj", "norm")
    )
    del tensors[gone], tensors[lost]
    tensors["model.new.weight"] = tensors.pop(old)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    found = {(change.kind, change.where): change.message for change in verify(model).changes}
    assert found["tensor", gone] == "was written and is not there"
    assert found["tensor", old] == "is model.new.weight now"
    assert found["tensor", lost] == "was written and is not there"
    assert ("setting", "config.json: rope_theta") in found


def test_the_base_knows_what_the_proof_has_no_room_for(
    merged: dict[str, Path], tuned: AdapterFixture, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(merged["hf"], model)
    (file,) = places(model)
    tensors = load_file(file)
    save_file({f"x{n}": x for n, x in enumerate(tensors.values())}, file, {"format": "pt"})
    named = {(change.kind, change.where) for change in verify(model, base=tuned.base.hf).changes}
    assert named >= {("tensor", name) for name in tensors}


def test_shards_that_changed_places_are_named(tuned: AdapterFixture, tmp_path: Path) -> None:
    base, model = tmp_path / "base", tmp_path / "model"
    shutil.copytree(tuned.base.hf, base)
    (whole,) = base.glob("*.safetensors")
    tensors = load_file(whole)
    whole.unlink()
    names, places = list(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, base / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    merge_into([tuned.path], base, model)
    assert verify(model).sound
    first, second = sorted(model.glob("*.safetensors"))
    first.rename(tmp_path / "kept")
    second.rename(first)
    (tmp_path / "kept").rename(second)
    named = {change.where for change in verify(model).changes}
    assert named == {f"model.safetensors.index.json says where {name} lies" for name in names}


def test_a_merged_model_is_a_base_whose_proof_is_not_passed_on(
    merged: dict[str, Path], tuned: AdapterFixture, tmp_path: Path
) -> None:
    for kind, path in merged.items():
        out = tmp_path / path.name
        merge_into([tuned.path], path, out, proof=False)
        assert stamped(out) is None, kind
        merge_into([tuned.path], path, out, force=True)
        assert verify(out, base=path).sound
        merge_into([tuned.path], path, out, force=True, proof=False)
        assert stamped(out) is None, kind


# No effect on those who load it.


def test_llama_cpp_and_transformers_run_a_model_with_its_proof(
    merged: dict[str, Path], tuned: AdapterFixture, tmp_path: Path
) -> None:
    prompts = prompts_for(tuned.base)
    merge_into([tuned.path], tuned.base.gguf, tmp_path / "bare.gguf", proof=False)
    with_proof = engine_logprobs(merged["gguf"], prompts)
    assert KEY in read_gguf(merged["gguf"]).metadata
    assert np.array_equal(with_proof, engine_logprobs(tmp_path / "bare.gguf", prompts))
    assert max_kl(logprobs(tuned.model, prompts), with_proof) < tuned.base.tolerance
    assert (merged["hf"] / BESIDE).is_file()
    kind = type(tuned.base.model)
    loaded = kind.from_pretrained(merged["hf"], attn_implementation="eager").eval()
    assert max_kl(logprobs(tuned.model, prompts), logprobs(loaded, prompts)) < 1e-9


def test_llama_cpp_loads_an_adapter_with_its_proof(tuned: AdapterFixture, tmp_path: Path) -> None:
    prompts = prompts_for(tuned.base)
    found: list[Any] = []
    for proof in (True, False):
        path = tmp_path / f"{proof}.gguf"
        convert(tuned.path, path, base=tuned.base.gguf, proof=proof)
        found.append(engine_logprobs(tuned.base.gguf, prompts, [(path, 1.0)]))
    assert stamped(tmp_path / "True.gguf") is not None
    assert np.array_equal(*found)
    assert max_kl(logprobs(tuned.model, prompts), found[0]) < tuned.base.tolerance
