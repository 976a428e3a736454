"""Self-contained files, broken files of every form, the command line, and the engine."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from engine import engine_logprobs, family_row, logprobs, make_base, max_kl, prompts_for
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tinylora_pack import TARGETS, chunked, inject, linear_names

import adapterkit
from adapterkit import projection
from adapterkit.conversion import convert
from adapterkit.errors import (
    BaseRequiredError,
    FormatError,
    IncompatibleBaseError,
    UnsupportedError,
)
from adapterkit.formats.peft import tinylora as peft_tinylora
from adapterkit.formats.protocol import FormatOptions
from adapterkit.registry import detect
from adapterkit_cli.main import cli

FIXTURES = Path(__file__).parents[2] / "fixtures"
HOSTILE = FIXTURES / "hostile" / "tinylora"
SOUND = FIXTURES / "tinylora"
SELF = SOUND / "self-contained.safetensors"

WEIGHTS = "adapter_model.safetensors"
OUTSIDE = "leads out of the checkpoint; nothing was opened"
UNSEEDED = "cannot be rebuilt; save the merged weights where it was trained"
DEFECTS: dict[str, tuple[type[Exception], str]] = {
    "empty.pt": (FormatError, "training saved an empty adapter"),
    "manifest-absolute": (FormatError, OUTSIDE),
    "manifest-backslash": (FormatError, OUTSIDE),
    "manifest-climbs": (FormatError, OUTSIDE),
    "manifest-entry-is-text": (FormatError, "files[1]: expects a mapping, has 'adapter_state.pt'"),
    "manifest-lists-no-state": (FormatError, "does not list adapter_state.pt"),
    "manifest-missing-file": (FormatError, "optim_state.pt: is listed, but is no file"),
    "manifest-wrong-digest": (FormatError, "COMPLETED: is not the file that was saved"),
    "matrix.pt": (FormatError, "q_proj.v: is no vector of numbers"),
    "not-completed": (FormatError, "has no COMPLETED: saving it was interrupted"),
    "peft-0.19-no-projections": (UnsupportedError, "no one can draw them again"),
    "peft-no-b": (FormatError, "q_proj: has no tinylora_B"),
    "peft-no-vectors": (FormatError, "its vectors tinylora_v have shapes [], not one (u,)"),
    "peft-one-projection": (FormatError, "q_proj: has no tinylora_P, other modules have"),
    "peft-other-rank": (FormatError, "r is 4 in the config, its factors have 2"),
    "peft-other-tying": (FormatError, "makes 2 vectors, the file has 1"),
    "peft-other-u": (FormatError, "u is 7 in the config, its vectors have 3"),
    "peft-ranks-disagree": (FormatError, "q_proj: its parts do not fit: A is [2, 5], B is [6, 3]"),
    "peft-seed-is-text": (FormatError, "projection_seed: expects a whole number from -"),
    "peft-tying-is-text": (FormatError, "weight_tying: expects a number from 0 to 1, has 'half'"),
    "self-header-is-a-list.safetensors": (
        FormatError,
        "tinylora: expects a mapping, has a list",
    ),
    "self-header-not-json.safetensors": (FormatError, "its header holds no JSON"),
    "self-no-left.safetensors": (FormatError, "needs left, right and either projection or middle"),
    "self-no-modules.safetensors": (FormatError, "holds no modules"),
    "self-no-vector.safetensors": (FormatError, "its group 4 has no vector"),
    "self-projection-and-middle.safetensors": (FormatError, "either projection or middle"),
    "self-scale-is-text.safetensors": (FormatError, ".scale: expects a finite number, has '"),
    "self-shapes-disagree.safetensors": (FormatError, "do not fit: [6, 3], [2, 5], [3, 2, 2]"),
    "self-unknown-tensor.safetensors": (FormatError, "stranger: belongs to no module"),
    "self-unused-vector.safetensors": (FormatError, "v.1: belongs to no module"),
    "self-version-2.safetensors": (UnsupportedError, "version 2; this adapterkit reads 1"),
    "self-witness-broken.safetensors": (
        FormatError,
        "witness.singular_values[0]: expects a finite number",
    ),
    "two-lengths.pt": (FormatError, "its vectors have different lengths [3, 4]"),
    "unseeded-global-v.pt": (UnsupportedError, UNSEEDED),
    "unseeded-v.pt": (UnsupportedError, UNSEEDED),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_named(name: str, tmp_path: Path) -> None:
    kind, message = DEFECTS[name]
    with pytest.raises(kind) as caught:
        convert(HOSTILE / name, tmp_path / "out")
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_every_broken_file_is_tried() -> None:
    assert {path.name for path in HOSTILE.iterdir()} == DEFECTS.keys()


def test_link_out_of_a_checkpoint_is_not_followed(tmp_path: Path) -> None:
    folder = shutil.copytree(SOUND / "pack", tmp_path / "step")
    outside = tmp_path / "secret"
    outside.write_bytes(b"secret")
    (folder / "linked").symlink_to(outside)
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(b"secret").hexdigest()
    manifest["files"].append({"path": "linked", "sha256": digest})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="linked: is listed, but is no file of the checkpoint"):
        convert(folder, tmp_path / "out")


def test_checkpoint_without_a_base_says_what_to_give() -> None:
    with pytest.raises(BaseRequiredError, match=r"example/tiny-llama.*--base"):
        adapterkit.inspect(SOUND / "pack")


# Self-contained files.


def expected(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    tensors = {name: array.astype(float) for name, array in load_file(path).items()}
    with safe_open(path, "np") as file:
        document = json.loads(file.metadata()["tinylora"])
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, fields in document["modules"].items():
        middle = tensors.get(f"{name}.middle")
        if middle is None:
            v, p = tensors[f"v.{fields['group']}"], tensors[f"{name}.projection"]
            middle = sum(each * matrix for each, matrix in zip(v, p, strict=True))
        left, right = tensors[f"{name}.left"], tensors[f"{name}.right"]
        found[name] = fields["scale"] * left @ middle @ right
    return found


def assert_reads(path: Path, truth: dict[str, np.ndarray[Any, Any]]) -> None:
    spec = detect(path)
    pairs = {pair.module: pair for pair in spec.read(path, FormatOptions()).pairs()}
    assert pairs.keys() == truth.keys()
    for name, delta in truth.items():
        pair = pairs[name]
        mine = pair.scale * (pair.b.numpy().astype(float) @ pair.a.numpy().astype(float))
        mine = mine.T if pair.embedding else mine
        assert np.linalg.norm(mine - delta) <= 1e-6 * np.linalg.norm(delta)


def rewritten(path: Path, destination: Path, change: Any) -> Path:
    """Write a self-contained file again after `change(tensors, document)`."""
    tensors = load_file(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    document = json.loads(metadata["tinylora"])
    change(tensors, document)
    save_file(tensors, destination, {**metadata, "tinylora": json.dumps(document)})
    return destination


def test_self_contained_file_is_read() -> None:
    assert detect(SELF).name == "tinylora"
    assert_reads(SELF, expected(SELF))
    summary = adapterkit.inspect(SELF)
    assert (summary.modules, summary.ranks) == (2, {2: 2})


def test_directory_with_the_file_is_read(tmp_path: Path) -> None:
    shutil.copy(SELF, tmp_path / "tinylora.safetensors")
    assert_reads(tmp_path, expected(SELF))


def test_middle_matrix_instead_of_a_projection(tmp_path: Path) -> None:
    def change(tensors: dict[str, Any], document: dict[str, Any]) -> None:
        name = next(iter(document["modules"]))
        p = tensors.pop(f"{name}.projection")
        tensors[f"{name}.middle"] = np.ascontiguousarray(np.tensordot(tensors["v.0"], p, 1))
        del document["modules"][name]["group"]

    path = rewritten(SELF, tmp_path / "middle.safetensors", change)
    assert_reads(path, expected(SELF))


def test_embedding_is_turned(tmp_path: Path) -> None:
    def change(tensors: dict[str, Any], document: dict[str, Any]) -> None:
        del tensors
        for fields in document["modules"].values():
            fields["embedding"] = True

    path = rewritten(SELF, tmp_path / "table.safetensors", change)
    adapter = detect(path).read(path, FormatOptions())
    assert {pair.embedding for pair in adapter.pairs()} == {True}
    assert_reads(path, expected(SELF))


def test_written_again_is_the_same_file(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in ("once", "twice")]
    report = convert(SELF, paths[0], to="tinylora", proof=False)
    assert report.max_relative_error == 0
    convert(paths[0], paths[1], to="tinylora", proof=False)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    first, second = load_file(SELF), load_file(tmp_path / "once.safetensors")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("to", ["tinylora", "tinylora-peft"])
@pytest.mark.parametrize("source", ["self-contained.safetensors", "peft"])
def test_forms_become_each_other_exactly(source: str, to: str, tmp_path: Path) -> None:
    destination = tmp_path / ("out.safetensors" if to == "tinylora" else "out")
    report = convert(SOUND / source, destination, to=to)
    assert report.format == to
    assert report.max_relative_error < 1e-6
    # The same numbers make both fixtures; the self-contained one has a scale.
    factor = 1.0 if source == "self-contained.safetensors" else 2.0
    assert_reads(destination, {name: factor * x for name, x in expected(SELF).items()})


def test_ranks_that_differ_load_in_peft(tmp_path: Path) -> None:
    def change(tensors: dict[str, Any], document: dict[str, Any]) -> None:
        name = next(iter(document["modules"]))
        tensors[f"{name}.left"] = np.ascontiguousarray(tensors[f"{name}.left"][:, :1])
        tensors[f"{name}.right"] = np.ascontiguousarray(tensors[f"{name}.right"][:1])
        tensors[f"{name}.projection"] = np.ascontiguousarray(
            tensors[f"{name}.projection"][:, :1, :1]
        )

    path = rewritten(SELF, tmp_path / "ranks.safetensors", change)
    convert(path, tmp_path / "out", to="tinylora-peft")
    assert_reads(tmp_path / "out", expected(path))
    shapes = {array.shape for array in load_file(tmp_path / "out" / WEIGHTS).values()}
    assert shapes == {(6, 2), (2, 5), (3, 2, 2), (3,)}


def test_many_coefficients_are_folded_into_their_projections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_tinylora, "_ROOM", 3)
    convert(SELF, tmp_path / "out", to="tinylora-peft")
    assert_reads(tmp_path / "out", expected(SELF))
    assert load_file(tmp_path / "out" / WEIGHTS)["base_model.tinylora_v.0"].tolist() == [1.0]


def llama_base(tmp_path: Path) -> Path:
    """Return a base whose two layers have the fixtures' shapes."""
    folder = tmp_path / "base"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    weights = {f"{name}.weight": generator.normal(size=(6, 5)).astype("f4") for name in names}
    save_file(weights, folder / "model.safetensors")
    return folder


def test_witness_of_a_base_is_kept_and_checked(tmp_path: Path) -> None:
    base = llama_base(tmp_path)
    convert(SELF, tmp_path / "seen.safetensors", to="tinylora", base=base)
    report = convert(tmp_path / "seen.safetensors", tmp_path / "out", base=base)
    assert any("made on this base" in note for note in report.notes)
    name = "model.layers.0.mlp.up_proj.weight"
    weights = load_file(base / "model.safetensors")
    weights[name] = weights[name] * np.float32(1.0001)
    save_file(weights, base / "model.safetensors")
    with pytest.raises(IncompatibleBaseError, match=r"up_proj: its weight.*sha256 differs"):
        convert(tmp_path / "seen.safetensors", tmp_path / "out2", base=base)


# The command line.


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["tinylora", *map(str, arguments)])


def test_plan_is_printed_for_every_mode() -> None:
    base = FIXTURES / "peft" / "base"
    done = run("plan", "--base", base, "--budget", 13, "--json")
    report = json.loads(done.stdout)
    assert report["schema"] == 2
    assert report["modules"] == 14
    assert {plan["mode"]: plan["parameters"] for plan in report["plans"]} == {
        "tiled": 12,
        "structured": 14,
        "all": 8,
        "none": 14,
        "peft": 13,
    }
    text = run("plan", "--base", base, "--budget", 13).stdout
    assert text.splitlines()[0].startswith("14 modules (down_proj, gate_proj, k_proj")
    assert "tie_factor 5" in text
    assert "weight_tying 0.0714286" in text


def test_plan_of_some_targets_and_sizes() -> None:
    base = FIXTURES / "peft" / "base"
    done = run(
        "plan", "--base", base, "--budget", 8, "--targets", "q_proj,v_proj", "--sizes", 4, "--json"
    )
    report = json.loads(done.stdout)
    assert report["target_modules"] == ["q_proj", "v_proj"]
    tiled = report["plans"][0]
    assert (tiled["projection_dim"], tiled["tie_factor"], tiled["parameters"]) == (4, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--budget", 0), 2, "at least 1"),
        (("--budget", 13, "--sizes", "a"), 2, "is no whole number"),
        (("--budget", 13, "--sizes", "0"), 2, "at least 1"),
        (("--budget", 13, "--targets", "c_attn"), 4, "has no linear layer c_attn"),
    ],
)
def test_plan_refuses(arguments: tuple[Any, ...], code: int, message: str) -> None:
    done = run("plan", "--base", FIXTURES / "peft" / "base", *arguments)
    assert done.exit_code == code
    assert message in done.stderr


# The engine.


def test_llama_cpp_gives_the_logits_of_the_live_model(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base = make_base(family_row("llama"), tmp_path)
    prompts = prompts_for(base)[-4:]
    plain = logprobs(base.model, prompts)
    settings = {"frozen_rank": 2, "projection_dim": 13, "alpha": 13.0, "seed": 3}
    groups = chunked(linear_names(base.model, TARGETS), 4)
    injected = inject(base.model, groups, settings, spread=0.3)
    adapted = logprobs(injected.model, prompts)
    assert max_kl(plain, adapted) > 1e-2
    step = injected.save(tmp_path / "step")
    (step / "tinylora.json").write_text(json.dumps({"frozen_rank": 2, "alpha": 13.0}))
    report = convert(step, tmp_path / "adapter.gguf", base=base.hf)
    plans = [projection.plan(model, budget=13) for model in (base.hf, base.gguf)]
    assert plans[0].plans == plans[1].plans
    assert plans[0].modules == len(groups)
    assert report.source_format == "tinylora-pack"
    answer = engine_logprobs(base.gguf, prompts, [(tmp_path / "adapter.gguf", 1.0)])
    assert max_kl(adapted, answer) < base.tolerance
