"""Proofs that travel: every kind of change is caught and named, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from diffusion_files import FLUX, WIDTH, kohya, saved
from proven_files import BASE, FIXTURES, TINY, weights
from proven_files import written as written  # noqa: PLC0414  (a fixture)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import adapterkit
from adapterkit import VerifyReport, convert, verify
from adapterkit.errors import FormatError, UncheckableError
from adapterkit.stamps import LONGEST, stamp
from adapterkit_cli.main import cli

pytestmark = pytest.mark.slow


def kinds(report: VerifyReport) -> set[str]:
    return {change.kind for change in report.changes}


def test_what_was_written_is_sound(written: Path) -> None:
    report = verify(written, against=TINY, base=BASE)
    assert (report.sound, report.changes) == (True, ())
    assert report.notes == ("the base is compared by its configuration alone",)
    assert (report.written_by, report.modules) == (adapterkit.__version__, 6)
    assert list(report.sources) == ["tiny"]
    assert verify(written).sound


def test_without_its_base_a_gguf_is_compared_by_its_bytes(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "made.gguf", base=BASE)
    report = verify(tmp_path / "made.gguf")
    assert report.sound
    assert "give --base" in report.notes[0]


def test_any_flipped_byte_is_caught(written: Path) -> None:
    """One bit of each stretch of the file: of the data, of a name, of the proof itself."""
    file = weights(written)
    whole = file.read_bytes()
    for place in range(3, len(whole), 389):
        changed = bytearray(whole)
        changed[place] ^= 4
        file.write_bytes(changed)
        try:
            report = verify(written, base=BASE)
        except (FormatError, UncheckableError, adapterkit.AdapterKitError):
            continue
        assert not report.sound, (place, whole[place - 20 : place + 20])
        assert all(change.where and change.message for change in report.changes)
    file.write_bytes(whole)
    assert verify(written, base=BASE).sound


def tampered(written: Path, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Change the tensors as another program would that keeps the metadata."""
    file = weights(written)
    if file.suffix == ".safetensors":
        with safe_open(file, "np") as opened:
            metadata = opened.metadata()
        save_file(
            {k: np.array(v, order="C") for k, v in change(load_file(file)).items()}, file, metadata
        )
        return
    reader = gguf.GGUFReader(file)
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    made = gguf.GGUFWriter(file.with_suffix(".new"), "llama")
    for key, field in fields.items():
        if key != "general.architecture":
            made.add_key_value(key, field.contents(), field.types[0])
    for name, values in change(tensors).items():
        made.add_tensor(name, np.ascontiguousarray(values))
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    file.with_suffix(".new").replace(file)


def b_of(tensors: Mapping[str, Any], part: str) -> list[str]:
    return [name for name in tensors if "lora_b" in name.lower() and part in name]


def test_one_changed_number_names_its_tensor_and_module(written: Path) -> None:
    def change(tensors: dict[str, Any]) -> Mapping[str, Any]:
        (name, *_) = b_of(tensors, "v")
        values = tensors[name].copy()
        values.flat[3] += 5.0
        return {**tensors, name: values}

    tampered(written, change)
    report = verify(written, base=BASE)
    assert kinds(report) == {"tensor", "update"}
    (update,) = [change for change in report.changes if change.kind == "update"]
    assert "v_proj" in update.where
    # And with the source beside it, how far it is from that.
    against = verify(written, base=BASE, against=TINY)
    assert {c.where for c in against.changes if c.kind == "source"} >= {update.where}


def test_a_changed_scale_is_told_as_one(written: Path) -> None:
    tampered(
        written,
        lambda tensors: {
            n: v * (0.25 if n in b_of(tensors, "") else 1) for n, v in tensors.items()
        },
    )
    report = verify(written, base=BASE)
    (scale,) = [change for change in report.changes if change.kind == "scale"]
    assert (scale.where, scale.message[:4]) == ("all 6 modules", "0.25")
    assert kinds(report) == {"tensor", "scale"}


@pytest.mark.parametrize("written", ["peft"], indirect=True)
def test_a_changed_alpha_is_named_with_what_it_does(written: Path) -> None:
    config = written / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "lora_alpha": fields["lora_alpha"] * 2}))
    report = verify(written)
    assert [(c.kind, c.where) for c in report.changes] == [
        ("setting", "adapter_config.json: lora_alpha"),
        ("scale", "all 6 modules"),
    ]
    assert report.changes[1].message.startswith("2 times")


# What each format calls a module, what it is renamed to, and another; and their own names. The rows
# of v are in one order everywhere.
NAMED = {
    "peft": ("layers.0.self_attn.v_proj", "layers.2.self_attn.v_proj", "layers.1.mlp.down_proj"),
    "mlx": ("layers.0.self_attn.v_proj", "layers.2.self_attn.v_proj", "layers.1.mlp.down_proj"),
    "gguf": ("blk.0.attn_v", "blk.2.attn_v", "blk.1.ffn_down"),
}
RENAMED, ADDED, DROPPED = (f"model.{name}" for name in NAMED["peft"])


def tensors_changed(report: VerifyReport) -> dict[str, str]:
    return {change.where: change.message for change in report.changes if change.kind == "tensor"}


def updates_changed(report: VerifyReport) -> dict[tuple[str, str], str]:
    told = (change for change in report.changes if change.kind != "tensor")
    return {(change.kind, change.where): change.message for change in told}


def test_a_renamed_and_a_dropped_module_are_named_with_their_tensors(written: Path) -> None:
    old, new, gone = NAMED[written.name.removeprefix("made-")]
    before: list[str] = []

    def change(tensors: dict[str, Any]) -> Mapping[str, Any]:
        before.extend(tensors)
        return {n.replace(old, new): v for n, v in tensors.items() if gone not in n}

    tampered(written, change)
    report = verify(written, base=BASE)
    assert tensors_changed(report) == {
        **{name: f"is {name.replace(old, new)} now" for name in before if old in name},
        **{name: "was written and is not there" for name in before if gone in name},
    }
    assert len(tensors_changed(report)) == 4
    assert updates_changed(report) == {
        ("renamed", RENAMED): f"is {ADDED} now",
        ("dropped", DROPPED): "has no update any more",
    }


def test_an_added_module_is_named_with_its_tensors(written: Path) -> None:
    old, new, _ = NAMED[written.name.removeprefix("made-")]
    tampered(written, lambda t: {**t, **{n.replace(old, new): v for n, v in t.items() if old in n}})
    report = verify(written, base=BASE)
    assert len(tensors_changed(report)) == 2
    for name, message in tensors_changed(report).items():
        assert (new in name, message) == (True, "was not there when the file was written")
    assert updates_changed(report) == {("added", ADDED): "had no update when the file was written"}


def test_one_dropped_factor_is_named(written: Path) -> None:
    gone: list[str] = []

    def change(tensors: dict[str, Any]) -> Mapping[str, Any]:
        gone.append(b_of(tensors, "v")[0])
        return {name: values for name, values in tensors.items() if name not in gone}

    tampered(written, change)
    report = verify(written, base=BASE)
    assert tensors_changed(report) == {gone[0]: "was written and is not there"}
    assert len(updates_changed(report)) == 1


def test_what_no_name_fits_is_counted(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "made-peft", to="peft")
    tampered(
        tmp_path / "made-peft",
        lambda tensors: {f"x{number}": v * 2 for number, v in enumerate(tensors.values())},
    )
    told = tensors_changed(verify(tmp_path / "made-peft"))
    assert told.pop("12 tensors").startswith("are not there")
    assert set(told) == {f"x{number}" for number in range(12)}


# Files of diffusion models: what each spelling calls a module, and another of its sizes.
SPELLED = {
    "kohya": ("lora_unet_double_blocks_1_img_attn_proj", "lora_unet_double_blocks_2_img_attn_proj"),
    "diffusers": ("transformer_blocks.1.attn.to_out.0", "transformer_blocks.2.attn.to_out.0"),
    "comfyui": ("double_blocks.1.img_attn.proj", "double_blocks.2.img_attn.proj"),
}


@pytest.mark.parametrize("spelling", SPELLED)
def test_what_was_done_to_a_file_of_a_diffusion_model_is_named(
    spelling: str, tmp_path: Path
) -> None:
    old, new = SPELLED[spelling]
    beside = {"lora_unet_double_blocks_0_img_attn_proj": (WIDTH, WIDTH)}
    source, path = tmp_path / "source.safetensors", tmp_path / "made.safetensors"
    saved(source, kohya({**FLUX, **beside}))
    convert(source, path, to=spelling)
    assert verify(path, against=source).sound
    whole = path.read_bytes()
    names = [name for name in load_file(path) if old in name]
    up = next(name for name in names if "lora_up" in name or "lora_B" in name)

    def after(change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> VerifyReport:
        path.write_bytes(whole)
        tampered(path, change)
        return verify(path)

    changed = after(lambda t: {**t, up: t[up] + np.eye(WIDTH, 2, dtype="f4")})
    assert tensors_changed(changed) == {up: "is not what was written"}
    (module,) = updates_changed(changed)
    dropped = after(lambda t: {n: v for n, v in t.items() if n not in names})
    assert tensors_changed(dropped) == dict.fromkeys(names, "was written and is not there")
    assert list(updates_changed(dropped)) == [("dropped", module[1])]
    renamed = after(lambda t: {n.replace(old, new): v for n, v in t.items()})
    told = tensors_changed(renamed)
    assert {*names, *(name.replace(old, new) for name in names)} >= told.keys() >= {up}
    assert told[up] == f"is {up.replace(old, new)} now"
    (found,) = updates_changed(renamed).items()
    assert found == (("renamed", module[1]), f"is {module[1].replace('1', '2')} now")


def test_storage_in_another_dtype_is_told_as_rounding(written: Path) -> None:
    tampered(written, lambda tensors: {n: v.astype(np.float16) for n, v in tensors.items()})
    assert kinds(verify(written, base=BASE)) == {"tensor", "rounding"}


def test_another_base_is_named(written: Path, tmp_path: Path) -> None:
    other = tmp_path / "base"
    shutil.copytree(BASE, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "transformers_version": "9"}))
    assert verify(written, base=other).sound
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    report = verify(written, base=other)
    assert [change.kind for change in report.changes] == ["base"]
    assert "its sizes differ" in report.changes[0].message


def test_a_base_of_other_weights_is_named(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**json.loads((BASE / "config.json").read_text()))
    for seed in (1, 2):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(tmp_path / str(seed))
    convert(TINY, tmp_path / "made", to="peft", base=tmp_path / "1")
    assert verify(tmp_path / "made", base=tmp_path / "1").sound
    (change,) = verify(tmp_path / "made", base=tmp_path / "2").changes
    assert (change.kind, "its weights differ" in change.message) == ("base", True)


def test_another_source_is_named(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "made", to="peft")
    report = verify(tmp_path / "made", against=FIXTURES / "peft" / "tiny-weak")
    assert kinds(report) == {"source"}
    assert "by its sha256" in report.notes[0]


def test_the_source_of_a_command_that_changes_updates_is_told_by_its_bytes(tmp_path: Path) -> None:
    adapterkit.compress_file(TINY, tmp_path / "made", rank=1)
    report = verify(tmp_path / "made", against=TINY)
    assert report.sound
    assert "compress makes other updates of it" in report.notes[0]
    assert report.options["rank"] == "1"
    assert kinds(verify(tmp_path / "made", against=FIXTURES / "peft" / "tiny-weak")) == {"source"}


def test_an_adapter_in_memory_is_held_against_the_proof_of_its_file(written: Path) -> None:
    adapter = adapterkit.read(written, base=BASE)
    assert verify(adapter, base=BASE, against=adapterkit.read(TINY)).sound
    half = adapter.replace(scales={name: scale / 2 for name, scale in adapter.scales.items()})
    assert updates_changed(verify(half, base=BASE)).keys() == {("scale", "all 6 modules")}
    assert kinds(verify(written, base=BASE, against=half)) == {"source"}
    with pytest.raises(UncheckableError, match="made in memory and carries no proof"):
        verify(adapter.replace(provenance=None))


def test_what_carries_none_is_uncheckable_and_what_is_none_refused(tmp_path: Path) -> None:
    with pytest.raises(UncheckableError, match="carries no proof"):
        verify(TINY)
    convert(TINY, tmp_path / "bare", to="peft", proof=False)
    with pytest.raises(UncheckableError, match="carries no proof"):
        verify(tmp_path / "bare")
    convert(TINY, tmp_path / "made", to="peft")
    for text, message in (
        ("{", "not readable JSON"),
        ("[]", "not a JSON object"),
        ('{"schema": 7}', "of version 7"),
        ('{"schema": 1}', "adapterkit"),
        ("x" * (LONGEST + 1), "is no text of up to"),
    ):
        stamp(tmp_path / "made", text)
        with pytest.raises(FormatError, match=message):
            verify(tmp_path / "made")


def test_the_program(written: Path) -> None:
    line = ["verify", str(written), "--against", str(TINY), "--base", str(BASE)]
    run = CliRunner().invoke(cli, line)
    assert run.exit_code == 0
    assert "sound: every byte and every update is as it was written" in run.output
    document = json.loads(CliRunner().invoke(cli, [*line, "--json"]).stdout)
    assert (document["sound"], document["changes"]) == (True, [])
    tampered(
        written,
        lambda tensors: {n: -v if n in b_of(tensors, "") else v for n, v in tensors.items()},
    )
    run = CliRunner().invoke(cli, line)
    assert run.exit_code == 1
    assert "scale: all 6 modules: -1 times the update that was written" in run.output
