"""The pack's checkpoints, written: their witness restores the singular vectors' signs anywhere."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tinylora_pack import chunked, inject
from tinylora_pack_models import (
    EXACT,
    SETTINGS,
    injected,
    llama,
    names,
    read,
    state_settings,
    worst,
    written,
)
from tinylora_pack_models import base as base  # noqa: PLC0414  (a fixture)

from adapterkit import inspect
from adapterkit.base import open_base
from adapterkit.conversion import convert
from adapterkit.errors import (
    FormatError,
    IncompatibleBaseError,
    LossyConversionError,
    UncheckableError,
)
from adapterkit.formats.protocol import FormatOptions
from adapterkit.registry import detect
from adapterkit.tinylora.targets import target_modules

if TYPE_CHECKING:
    from pathlib import Path

torch.set_num_threads(1)


def test_checkpoint_is_written_as_the_pack_does(base: Path, tmp_path: Path) -> None:
    pack, model = written(base, tmp_path)
    state = torch.load(pack / "adapter_state.pt", weights_only=True)
    assert list(state) == list(model.state())
    assert all(torch.equal(state[name], vector) for name, vector in model.state().items())
    manifest = json.loads((pack / "manifest.json").read_text())
    assert {entry["path"] for entry in manifest["files"]} == {"adapter_state.pt", "tinylora.json"}
    for entry in manifest["files"]:
        data = (pack / entry["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    assert manifest["metadata"]["seed"] == 7
    assert (pack / "COMPLETED").is_file()


def test_self_contained_form_goes_back_to_the_pack(base: Path, tmp_path: Path) -> None:
    model = injected()
    source = state_settings(model.save(tmp_path / "step"))
    convert(source, tmp_path / "self.safetensors", to="tinylora", base=base)
    adapter = detect(tmp_path / "self.safetensors").read(
        tmp_path / "self.safetensors", FormatOptions()
    )
    assert worst(adapter, model) < EXACT
    report = convert(
        tmp_path / "self.safetensors", tmp_path / "pack", to="tinylora-pack", base=base
    )
    assert report.max_relative_error == 0
    state = torch.load(tmp_path / "pack" / "adapter_state.pt", weights_only=True)
    assert all(torch.equal(state[name], vector) for name, vector in model.state().items())


@pytest.mark.parametrize("form", ["pack", "self-contained"])
def test_trained_files_beside_it_go_along_or_are_a_loss(
    form: str, base: Path, tmp_path: Path
) -> None:
    source, _ = written(base, tmp_path)
    if form == "self-contained":
        (tmp_path / "own").mkdir()
        file = tmp_path / "own" / "tinylora.safetensors"
        convert(source, file, to="tinylora", base=base)
        source = file.parent
    assert inspect(source, base=base).beside == ()
    save_file({"v_head.weight": torch.ones(1, 32)}, source / "value_head.safetensors")
    assert [file.name for file in inspect(source, base=base).beside] == ["value_head.safetensors"]
    convert(source, tmp_path / "peft", base=base)
    copied = (tmp_path / "peft" / "value_head.safetensors").read_bytes()
    assert copied == (source / "value_head.safetensors").read_bytes()
    for to, suffix in (("tinylora", ".safetensors"), ("tinylora-pack", "")):
        with pytest.raises(LossyConversionError, match=r"value_head\.safetensors"):
            convert(source, tmp_path / f"no{suffix}", to=to, base=base)


def test_witness_restores_the_signs_on_any_machine(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, model = written(base, tmp_path)
    true_svd = torch.linalg.svd

    def flipped(matrix: torch.Tensor, **options: Any) -> Any:
        u, s, vh = true_svd(matrix, **options)
        sign = torch.ones(len(s))
        sign[1] = -1
        return u * sign, s, vh * sign[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    assert worst(read(pack, base), model) < EXACT
    assert not any("recomputed" in note for note in read(pack, base).provenance.notes)
    # The same file without its witness is off by what the note says it may be.
    shutil.copytree(pack, tmp_path / "bare")
    for name in ("manifest.json", "tinylora.json"):
        (tmp_path / "bare" / name).unlink()
    state_settings(tmp_path / "bare", seed=7)
    adapter = read(tmp_path / "bare", base)
    (note,) = (note for note in adapter.provenance.notes if "recomputed with torch" in note)
    assert note.endswith(f"off by {worst(adapter, model):.0%}")


def test_witness_refuses_other_weights(base: Path, tmp_path: Path) -> None:
    pack, _ = written(base, tmp_path)
    llama(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(IncompatibleBaseError, match=r"q_proj.*sha256 differs"):
        read(pack, tmp_path / "other")
    llama().bfloat16().save_pretrained(tmp_path / "rounded")
    with pytest.raises(IncompatibleBaseError, match=r"was made on F32 weights, .* has BF16"):
        read(pack, tmp_path / "rounded")


def tampered(pack: Path, **fields: Any) -> None:
    """Change the witness of one module, and vouch for it in the manifest."""
    path = pack / "tinylora.json"
    document = json.loads(path.read_text())
    document["witness"]["model.layers.0.self_attn.q_proj"].update(fields)
    path.write_text(json.dumps(document))
    manifest = json.loads((pack / "manifest.json").read_text())
    manifest["files"] = [e for e in manifest["files"] if e["path"] != "tinylora.json"]
    (pack / "manifest.json").write_text(json.dumps(manifest))


def test_witness_refuses_other_singular_values(base: Path, tmp_path: Path) -> None:
    pack, _ = written(base, tmp_path)
    tampered(pack, singular_values=[0.9, 0.8, 0.7])
    with pytest.raises(IncompatibleBaseError, match="singular values are not those"):
        read(pack, base)


def test_witness_of_another_rank_is_malformed(base: Path, tmp_path: Path) -> None:
    pack, _ = written(base, tmp_path)
    tampered(pack, anchors=[1], signs=[1])
    with pytest.raises(FormatError, match="does not fit the weight"):
        read(pack, base)


def with_close_values(gap: float, folder: Path) -> Any:
    """Return a model whose first q_proj has two leading singular values `gap` apart."""
    model = llama()
    weight = model.model.layers[0].self_attn.q_proj.weight
    u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    s[0], s[1] = 1.0, 1.0 - gap
    s[2:] = torch.linspace(0.5, 0.1, len(s) - 2)
    with torch.no_grad():
        weight.copy_(u @ torch.diag(s) @ vh)
    model.save_pretrained(folder)
    return model


def test_close_singular_values_are_warned_of(tmp_path: Path) -> None:
    model = inject(with_close_values(1e-4, tmp_path / "base"), chunked(names(), 4), SETTINGS)
    folder = state_settings(model.save(tmp_path / "step"))
    notes = read(folder, tmp_path / "base").provenance.notes
    (note,) = (note for note in notes if "so close" in note)
    assert "layers.0.self_attn.q_proj" in note
    predicted = float(note.split("up to ")[1].split()[0])
    assert predicted == pytest.approx(6e-3, rel=0.05)


def test_equal_singular_values_cannot_be_witnessed(tmp_path: Path) -> None:
    model = inject(with_close_values(1e-6, tmp_path / "base"), chunked(names(), 4), SETTINGS)
    folder = state_settings(model.save(tmp_path / "step"))
    with pytest.raises(UncheckableError, match=r"q_proj.*cannot be found again"):
        convert(folder, tmp_path / "pack", to="tinylora-pack", base=tmp_path / "base")
    assert not (tmp_path / "pack").exists()
    convert(folder, tmp_path / "self.safetensors", to="tinylora", base=tmp_path / "base")


def test_conv1d_and_embeddings_are_no_targets_of_the_pack(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = open_base(tmp_path)
    wanted = ("c_attn", "c_fc", "wte", "wpe")
    assert target_modules(model, wanted, conv1d=False) == ()
    assert target_modules(model, wanted) == tuple(
        f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in ("attn.c_attn", "mlp.c_fc")
    )


def test_base_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = state_settings(injected().save(tmp_path / "step"))
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(
        FormatError, match=r"layers\.1\.mlp\.up_proj: its weight in the base holds NaN"
    ):
        read(folder, tmp_path / "base")
