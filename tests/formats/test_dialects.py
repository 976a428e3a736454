"""Dialect files: their grammar, which of them explains a file, and what is refused, how."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from dialect_cases import BROKEN, LLAMA, SOUND, delta
from safetensors.numpy import save_file

import adapterkit
from adapterkit.errors import (
    BaseRequiredError,
    FormatError,
    IncompatibleBaseError,
    UnknownFormatError,
    UsageError,
)
from adapterkit.formats.handwritten.dialects import open_document
from adapterkit.formats.handwritten.format import probe
from adapterkit.keys import Role
from adapterkit.registry import detect
from fixtures.generators import torch_zip

pytestmark = pytest.mark.slow

# file -> options, error, a part of its message
REFUSED = {
    "empty-dictionary.pt": ({"alpha": 1.0}, FormatError, "saved an empty adapter"),
    "no-dialect.safetensors": (
        {"alpha": 1.0},
        FormatError,
        "pass a dialect file of your own with --dialect\n  loralib: norm.gain: is not explained",
    ),
    "square-only.npz": ({"alpha": 1.0}, UsageError, "pass --dialect numpy-gpt2"),
    "swapped.safetensors": (
        {"alpha": 1.0, "dialect": "loralib"},
        FormatError,
        "v_proj: dialect loralib does not explain the file: its factors would be A [16, 4] and B",
    ),
    "two-dialects.pt": (
        {"alpha": 1.0},
        UsageError,
        "2 dialects explain every tensor; pass one of\n  --dialect raschka-alpha ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_says_too_little_is_refused_with_what_to_pass(name: str) -> None:
    options, kind, message = REFUSED[name]
    with pytest.raises(kind) as caught:
        adapterkit.read(BROKEN / name, **options)
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_every_broken_fixture_is_expected() -> None:
    assert {path.name for path in BROKEN.iterdir()} == {*REFUSED, "half-pair.safetensors"}


def test_half_a_pair_is_shown_and_never_written(tmp_path: Path) -> None:
    adapter = adapterkit.read(BROKEN / "half-pair.safetensors", alpha=4)
    summary = adapterkit.summarize(adapter)
    assert summary.problems == ("model.layers.0.self_attn.v_proj.lora_A: has no lora_B beside it",)
    with pytest.raises(FormatError, match="has no lora_B beside it"):
        adapterkit.convert(BROKEN / "half-pair.safetensors", tmp_path / "out", alpha=4)
    assert not list(tmp_path.iterdir())


STRANGE = {
    "three axes": ({"fc.lora_A": (2, 3, 4), "fc.lora_B": (5, 2)}, "not that of a factor"),
    "one axis": ({"fc.lora_A": (2,), "fc.lora_B": (5, 2)}, "not that of a factor"),
    "no rank in common": ({"fc.lora_A": (4, 6), "fc.lora_B": (5, 3)}, "share no rank"),
    "five slots": ({"c.lora_A": (10, 6), "c.lora_B": (5, 2)}, "share no rank"),
    "too much": ({"a.lora_A": (2, 6), "a.lora_B": (5, 2), "a.lora_m": (5,)}, "a.lora_m"),
    "frozen and trained": (
        {"a.lora_A": (2, 6), "a.lora_B": (5, 2), "a.weight": (5, 6), "b.lora_A": (2, 6)},
        "a.weight: is not explained",
    ),
    "another weight": (
        {"a.lora_A": (2, 6), "a.lora_B": (5, 2), "a.weight": (5, 7)},
        r"its update would be \[5, 6\], its weight is \[5, 7\]",
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_shapes_that_make_no_adapter_are_refused(name: str, tmp_path: Path) -> None:
    shapes, message = STRANGE[name]
    save_file({key: np.ones(s, "f4") for key, s in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=message):
        adapterkit.read(tmp_path / "a.safetensors", alpha=1)


def test_an_empty_factor_is_shown(tmp_path: Path) -> None:
    arrays = {"fc.lora_A": np.ones((0, 6), "f4"), "fc.lora_B": np.ones((5, 0), "f4")}
    arrays |= {"up.lora_A": np.ones((2, 6), "f4"), "up.lora_B": np.ones((5, 2), "f4")}
    save_file(arrays, tmp_path / "a.safetensors")
    adapter = adapterkit.read(tmp_path / "a.safetensors", alpha=1)
    assert adapterkit.summarize(adapter).problems[0].startswith("fc.lora_A: is empty")


@pytest.mark.parametrize(("half", "size"), [("A", 3), ("B", 4)])
def test_a_bias_of_another_size_is_refused(half: str, size: int, tmp_path: Path) -> None:
    arrays = {"fc.lora_A.weight": np.ones((2, 6), "f4"), "fc.lora_B.weight": np.ones((5, 2), "f4")}
    arrays[f"fc.lora_{half}.bias"] = np.ones(size, "f4")
    save_file(arrays, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="beside factors of 5 rows and rank 2"):
        adapterkit.read(tmp_path / "a.safetensors", alpha=1, dialect="linear-factors")


@pytest.mark.parametrize("name", ["loralib.safetensors", "numpy-gpt2.npz"])
def test_alpha_must_be_given_and_is_used(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"alpha is not in the file, .* \(r = 4\); .*--alpha"):
        adapterkit.read(SOUND / name)
    report = adapterkit.convert(SOUND / name, tmp_path / "peft", alpha=8)
    assert report.source_format == "handwritten"
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (config["lora_alpha"], config["r"]) == (8, 4)


def test_the_command_line_takes_dialect_and_alpha(tmp_path: Path) -> None:
    from adapterkit_cli.main import cli

    source, target = str(SOUND / "raschka.pt"), str(tmp_path / "peft")
    done = CliRunner().invoke(cli, ["convert", source, "-o", target])
    assert done.exit_code == 2, done.output
    assert "--dialect raschka-alpha-over-r" in done.output
    extra = ["--dialect", "raschka-alpha", "--alpha", "3"]
    done = CliRunner().invoke(cli, ["convert", source, "-o", target, *extra])
    assert done.exit_code == 0, done.output


def test_scales_of_the_two_books_differ_by_the_rank() -> None:
    options = {"alpha": 3.0}
    old = adapterkit.read(SOUND / "raschka.pt", dialect="raschka-alpha", **options)
    new = adapterkit.read(SOUND / "raschka.pt", dialect="raschka-alpha-over-r", **options)
    assert set(old.scales) == {"transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"}
    assert {old.scales[module] / new.scales[module] for module in old.scales} == {4.0}


def test_the_wrappers_a_is_the_factor_at_the_output() -> None:
    adapter = adapterkit.read(SOUND / "numpy-gpt2.npz", alpha=4)
    arrays = np.load(SOUND / "numpy-gpt2.npz")
    for module, found in delta(adapter).items():
        product = arrays[f"{module}_lora_A"] @ arrays[f"{module}_lora_B"]
        assert np.array_equal(found, product), module
    assert set(adapter.scales) == {"blocks.0.mlp.c_fc", "blocks.0.attn.c_proj"}


def test_a_square_file_is_read_when_its_dialect_is_named() -> None:
    adapter = adapterkit.read(BROKEN / "square-only.npz", alpha=4, dialect="numpy-gpt2")
    assert list(adapter.scales) == ["blocks.0.attn.c_proj"]


def test_two_alphas_that_differ_are_refused(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('extends = "loralib"\nalpha = 16\n')
    source = SOUND / "loralib.safetensors"
    assert set(adapterkit.read(source, dialect=str(own)).scales.values()) == {4.0}
    assert adapterkit.read(source, dialect=str(own), alpha=16)
    with pytest.raises(UsageError, match="alpha is 16 in the file, --alpha is 8"):
        adapterkit.read(source, dialect=str(own), alpha=8)


@pytest.mark.parametrize(
    ("settings_file", "value"), [("lora.json", "8"), ("lora.yaml", "8"), ("lora.yml", "'8.0'")]
)
def test_alpha_may_lie_beside_the_file(tmp_path: Path, settings_file: str, value: str) -> None:
    kind = "json" if settings_file.endswith("json") else "yaml"
    text = f'{{"a": {{"b": {value}}}}}' if kind == "json" else f"a:\n  b: {value}\n"
    (tmp_path / settings_file).write_text(text)
    own = tmp_path / "own.toml"
    own.write_text(f'extends = "loralib"\nalpha = ["beside:{settings_file}:a.b"]\n')
    source = tmp_path / "lora.safetensors"
    source.write_bytes((SOUND / "loralib.safetensors").read_bytes())
    assert set(adapterkit.read(source, dialect=str(own)).scales.values()) == {2.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not readable YAML"),
        ("- 1\n", "is not a mapping of keys to values"),
        ("a: &x 1\nb: *x\n", "holds YAML aliases"),
        (
            "a: !!python/object/apply:os.system ['touch adapterkit-was-executed']\n",
            "is not readable",
        ),
        ("#" * 70_000, "the most is 65536"),
        ("a:\n  b: many\n", "beside:lora.yaml:a.b: expects a finite number, has 'many'"),
    ],
)
def test_broken_settings_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora.yaml").write_text(text)
    (tmp_path / "own.toml").write_text('extends = "loralib"\nalpha = ["beside:lora.yaml:a.b"]\n')
    source = tmp_path / "lora.safetensors"
    source.write_bytes((SOUND / "loralib.safetensors").read_bytes())
    with pytest.raises(FormatError, match=message):
        adapterkit.read(source, dialect="own.toml")
    assert not (tmp_path / "adapterkit-was-executed").exists()


def save_torchtune(path: Path, heads: int, groups: int) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for name, rows in (("q_proj", heads * 4), ("k_proj", groups * 4), ("v_proj", groups * 4)):
        state[f"layers.0.attn.{name}.lora_a.weight"] = torch.randn(2, 16)
        state[f"layers.0.attn.{name}.lora_b.weight"] = torch.randn(rows, 2)
        state[f"layers.0.attn.{name}.magnitude"] = torch.arange(rows).float()
    state["layers.0.mlp.w2.lora_a.weight"] = torch.randn(2, 24)
    state["layers.0.mlp.w2.lora_b.weight"] = torch.randn(16, 2)
    torch.save(state, path)
    return state


def rotated_pairs(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate neighbours, as torchtune does."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def rotated_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate halves, as Hugging Face does."""
    low, high = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([low * cos - high * sin, low * sin + high * cos], -1)


def test_torchtune_attends_as_hugging_face_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    heads, groups = 4, 2
    state = save_torchtune(tmp_path / "adapter_0.pt", heads, groups)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    adapter = adapterkit.read(tmp_path / "adapter_0.pt", alpha=4, base=tmp_path / "config.json")
    updates = delta(adapter)
    x, angles = torch.randn(5, 16), torch.rand(5, 2)

    def scores(rotate: object, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        q, k = (
            rotate((x @ weights[name].T).view(5, count, 4).transpose(0, 1), angles)
            for name, count in (("q_proj", heads), ("k_proj", groups))
        )
        return q @ k.repeat_interleave(heads // groups, 0).transpose(1, 2)

    tune, face = {}, {}
    for name in ("q_proj", "k_proj"):
        inner = f"layers.0.attn.{name}"
        tune[name] = 2 * state[f"{inner}.lora_b.weight"] @ state[f"{inner}.lora_a.weight"]
        face[name] = torch.tensor(updates[f"model.layers.0.self_attn.{name}"]).float()
    assert not torch.allclose(tune["q_proj"], face["q_proj"])
    assert torch.allclose(scores(rotated_pairs, tune), scores(rotated_halves, face), atol=1e-4)
    magnitude = adapterkit.TensorKey("model.layers.0.self_attn.k_proj", Role.MAGNITUDE)
    assert adapter.tensors[magnitude].numpy().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert set(updates) >= {"model.layers.0.mlp.down_proj", "model.layers.0.self_attn.v_proj"}


def test_torchtune_needs_the_base_and_a_known_family(tmp_path: Path) -> None:
    save_torchtune(tmp_path / "adapter_0.pt", 4, 2)
    with pytest.raises(BaseRequiredError, match="q_proj: the order of its rows depends on"):
        adapterkit.read(tmp_path / "adapter_0.pt", alpha=4)
    other = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 16, "n_head": 4}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(IncompatibleBaseError, match="no row order for family 'gpt2'"):
        adapterkit.read(tmp_path / "adapter_0.pt", alpha=4, base=tmp_path / "config.json")


POSITIONAL = {
    "list": 'extends = "cloneofsimo-list"\nmodules = ["first", "second"]\n',
    "safetensors": 'extends = "cloneofsimo"\n[modules]\nunet = ["first", "second"]\n',
}


@pytest.mark.parametrize("container", POSITIONAL)
def test_modules_told_by_position_get_their_names_from_the_user(
    container: str, tmp_path: Path
) -> None:
    ups = [np.random.default_rng(place).normal(size=(6, 2)).astype("f4") for place in range(2)]
    downs = [np.random.default_rng(place).normal(size=(2, 4)).astype("f4") for place in range(2)]
    source = tmp_path / "lora"
    if container == "list":
        pairs = zip(ups, downs, strict=True)
        torch.save([torch.tensor(factor) for pair in pairs for factor in pair], source)
    else:
        named = {f"unet:{place}:up": up for place, up in enumerate(ups)}
        save_file(named | {f"unet:{place}:down": down for place, down in enumerate(downs)}, source)
    with pytest.raises(UsageError, match="tells its modules by position only") as caught:
        adapterkit.read(source)
    assert 'extends "cloneofsimo' in str(caught.value)
    own = tmp_path / "own.toml"
    own.write_text(POSITIONAL[container])
    found = delta(adapterkit.read(source, dialect=str(own)))
    for place, module in enumerate(("first", "second")):
        assert np.allclose(found[module], ups[place] @ downs[place])
    own.write_text(POSITIONAL[container].replace(', "second"', ""))
    with pytest.raises(UsageError, match="position 1 has no name"):
        adapterkit.read(source, dialect=str(own))


def test_a_litgpt_file_without_its_settings_says_which_are_missing(tmp_path: Path) -> None:
    prefix = "transformer.h.0.attn.qkv"
    state = {f"{prefix}.lora_A": torch.randn(4, 16), f"{prefix}.lora_B": torch.randn(24, 2)}
    source = tmp_path / "lit_model.pth.lora"
    torch.save({"model": state}, source)
    with pytest.raises(FormatError, match=r"beside:hyperparameters\.yaml:lora_query, which is not"):
        adapterkit.read(source, alpha=1)
    flags = "lora_query: true\nlora_key: false\nlora_value: true\n"
    (tmp_path / "hyperparameters.yaml").write_text(flags)
    with pytest.raises(
        FormatError, match=r"n_head, which beside:model_config\.yaml does not state"
    ):
        adapterkit.read(source, alpha=1)
    sizes = "n_head: 4\nn_query_groups: 4\nhead_size: 4\n"
    (tmp_path / "model_config.yaml").write_text(sizes)
    with pytest.raises(FormatError, match=r"24 rows, which q, v do not divide as \[16, 16\]"):
        adapterkit.read(source, alpha=1)
    (tmp_path / "model_config.yaml").write_text(sizes + "mlp_class_name: GptNeoxMLP\n")
    with pytest.raises(FormatError, match="known for Llama-like models only"):
        adapterkit.read(source, alpha=1)
    (tmp_path / "model_config.yaml").write_text(sizes.replace("groups: 4", "groups: zero"))
    with pytest.raises(
        FormatError, match=r"n_query_groups: expects a whole number from 1 .*'zero'"
    ):
        adapterkit.read(source, alpha=1)


def test_the_probe_leaves_strangers_alone(tmp_path: Path) -> None:
    save_file({"model.norm.weight": np.zeros(3, "f4")}, tmp_path / "model.safetensors")
    (tmp_path / "text").write_text("a note\n")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("model.safetensors", "text", "empty", "none"):
        assert not probe(tmp_path / name)
    assert not probe(tmp_path)
    with pytest.raises(UnknownFormatError):
        detect(tmp_path / "model.safetensors")


def test_a_malicious_pickle_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "adapter.pt"
    path.write_bytes(torch_zip.malicious()["pickle-os-system"])
    assert detect(path).name == "handwritten"
    with pytest.raises(adapterkit.UnsafePickleError, match=r"posix\.system; nothing was executed"):
        adapterkit.read(path, alpha=1)


def test_it_is_read_only(tmp_path: Path) -> None:
    adapter = adapterkit.read(SOUND / "loralib.safetensors", alpha=1)
    with pytest.raises(UsageError, match="can be read but not written"):
        adapterkit.write(adapter, tmp_path / "out", to="handwritten")


def test_a_document_keeps_what_is_no_tensor(tmp_path: Path) -> None:
    torch.save({"model": {"a.b": torch.ones(2)}, "args": {"lora": {"alpha": 4}}}, tmp_path / "c.pt")
    document = open_document(tmp_path / "c.pt")
    assert document.value("file:args.lora.alpha") == 4
    assert document.value("file:args.lora.beta") is None
    assert document.value("beside:none.json:a") is None
    assert list(document.tensors("model") or ()) == ["a.b"]
    assert document.tensors("args.lora.alpha") is None


def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path: Path) -> None:
    for padding in range(700):
        tensors = {"fc.lora_A": np.ones((2, 6), "f4"), "fc.lora_B": np.ones((5, 2), "f4")}
        path = tmp_path / "a.safetensors"
        save_file(tensors, path, {"x": "y" * padding})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert detect(path).name == "handwritten"
    assert open_document(path).container == "safetensors"
