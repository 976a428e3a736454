"""Dialect files: their grammar, which of them explains a file, and what is refused, how."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import adapterkit
from adapterkit.errors import (
    BaseRequiredError,
    FormatError,
    IncompatibleBaseError,
    UnknownFormatError,
    UsageError,
)
from adapterkit.formats.handwritten.dialects import builtin, load, open_document
from adapterkit.formats.handwritten.dialects.loading import names
from adapterkit.formats.handwritten.format import probe
from adapterkit.formats.handwritten.format import read as read_handwritten
from adapterkit.formats.protocol import Options
from adapterkit.keys import Role
from adapterkit.registry import detect
from fixtures.generators import torch_zip

ROOT = Path(__file__).parents[2]
SOUND, BROKEN = ROOT / "fixtures/handwritten", ROOT / "fixtures/hostile/handwritten"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}

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


def delta(adapter: adapterkit.AdapterTensorSet) -> dict[str, np.ndarray]:
    return {
        pair.module: pair.scale * (pair.b.numpy().astype("f8") @ pair.a.numpy().astype("f8"))
        for pair in adapter.pairs()
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


def test_telling_a_dialect_imports_neither_torch_nor_yaml() -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from adapterkit.formats.handwritten.dialects import *\n"
        "document = open_document(Path(sys.argv[1]))\n"
        "assert isinstance(explain(load('loralib'), document), Explanation)\n"
        "assert not {'torch', 'yaml'} & set(sys.modules)"
    )
    source = str(SOUND / "loralib.safetensors")
    subprocess.run([sys.executable, "-c", code, source], check=True, timeout=60)


@pytest.mark.parametrize("name", names())
def test_every_builtin_dialect_is_whole(name: str) -> None:
    dialect = next(dialect for dialect in builtin() if dialect.name == name)
    assert dialect.title
    assert not dialect.title.endswith(".")
    parents = {other.name for other in builtin()}
    assert dialect.extends is None or dialect.extends in parents


MINIMAL = """
title = "mine"
containers = ["safetensors"]
scale = "alpha/r"
[[tensor]]
match = '(?P<module>.+)[.]down'
axes = "r in"
[[tensor]]
match = '(?P<module>.+)[.]up'
axes = "out r"
"""
# a change of the minimal file -> what is said of it
WRONG = {
    "oops = 1\n" + MINIMAL: "oops: unknown field; known are title",
    MINIMAL.replace('"mine"', "3"): "title: expects text, has 3",
    MINIMAL.replace('title = "mine"', ""): "title: is missing",
    MINIMAL.replace(
        "alpha/r", "alpha*r"
    ): "scale: expects one of alpha/r, alpha/sqrt(r), alpha, 1, has 'alpha*r'",
    MINIMAL.replace(
        '["safetensors"]', '["zip"]'
    ): "containers[0]: expects one of torch, npz, safetensors, has 'zip'",
    MINIMAL.replace('["safetensors"]', '"npz"'): "containers: expects a list of 1 to 3 (one of",
    MINIMAL.replace('"r in"', '"r out in"'): "tensor[0].axes: 'r out in' are no axes",
    MINIMAL.replace('"out r"', '"r r"'): "tensor[1].axes: 'r r' are no axes",
    MINIMAL.replace("(?P<module>.+)[.]up", ".+"): "tensor[1].match: '.+' has no group (?P<module>",
    MINIMAL.replace("[.]up", "("): "is no regular expression",
    MINIMAL + 'role = "full"\n': "tensor[1].axes: a rule has either axes or a role",
    MINIMAL.replace('axes = "out r"', 'role = "up"'): "tensor[1].role: 'up' is none of",
    MINIMAL + 'unless = "{layer}"\n': "tensor[1].unless: '{layer}' makes no sense here",
    'alpha = ["alpha.txt"]\n' + MINIMAL: "alpha: 'alpha.txt' is no source",
    'alpha = ["beside:../x.json:a"]\n' + MINIMAL: "is no source",
    "detect = 1\n" + MINIMAL: "detect: expects true or false, has 1",
    "stride = 0\n" + MINIMAL: "stride: expects a whole number from 1 to 1048576, has 0",
    "tensor = 3\n" + MINIMAL.partition("[[")[0]: "tensor: expects a list (a mapping each), has 3",
    MINIMAL.partition("[[")[0]: "tensor: no rule has axes",
    MINIMAL + "[weight]\nname = 'x'\n": "weight.name: 'x' does not hold {module}",
    MINIMAL + "[weight]\nname = '{module}'\naxes = 'in'\n": "weight.axes: is neither",
    "weight = 3\n" + MINIMAL: "weight: expects a mapping, has 3",
    MINIMAL + "[[blocks]]\nmatch = '.+'\n": "blocks[0].slots: is empty",
    MINIMAL + "[[blocks]]\nmatch = '.+'\nslots = ['q']\nenabled = ['k']\n": "'k' is none of the",
    MINIMAL + "[[blocks]]\nmatch = '.+'\nslots = ['q']\n[blocks.sizes]\n": "sizes: has no 'q'",
    MINIMAL + "[[blocks]]\nmatch='.+'\nslots=['q']\nnumbers='beside:a.json'\nsizes={q='2 **'}\n": (
        "blocks[0].sizes.q: '2 **' makes no sense"
    ),
    MINIMAL
    + "[[convolution]]\nmatch = '.+'\nkernel = 0\n": "kernel: expects a whole number from 1",
    MINIMAL + "[[rename]]\nmatch = 'a'\nto = '{b}'\n": "rename[0].to: '{b}' makes no sense",
    MINIMAL + "[[rename]]\nmatch = 'a'\nto = 'b'\nslot = 1\n": "1 is not below slots = 1",
    MINIMAL + "[[rename]]\nmatch = 'a'\nto = 'b'\nrows = {llama = 'spin(2)'}\n": "no row order",
    MINIMAL + "[[rename]]\nmatch = 'a'\nto = 'b'\nrows = 3\n": "rows: expects a mapping of names",
    MINIMAL
    + "[[expect]]\nsource = 'file:a'\nvalues = 3\nmessage = ''\n": "values: expects a list of 1 to",
    'extends = "nothing"\n' + MINIMAL: "extends: 'nothing' is no built-in dialect",
    "modules = 3\n" + MINIMAL: "modules: expects a mapping of names",
    "title = ": "is not readable TOML",
    "#" * ((1 << 20) + 1): "the most is 1048576",
}


@pytest.mark.parametrize("text", WRONG, ids=list(WRONG.values()))
def test_a_dialect_file_with_a_mistake_is_refused_at_its_place(text: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(FormatError) as caught:
        load(str(path))
    assert WRONG[text] in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_unknown_dialect_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'rashka'; known dialects: .*raschka-alpha"):
        load("rashka")


@dataclass(frozen=True)
class Written:
    """A dialect, a file of it, and the updates that the file holds."""

    toml: str
    tensors: dict[str, np.ndarray]
    updates: dict[str, np.ndarray]
    container: str
    select: str
    weights: dict[str, np.ndarray]

    def save(self, folder: Path, tensors: dict[str, np.ndarray] | None = None) -> tuple[Path, str]:
        own = folder / "own.toml"
        own.write_text(self.toml)
        path = folder / "lora"
        stored = self.tensors if tensors is None else tensors
        if self.container == "safetensors":
            save_file(stored, path)
        elif self.container == "npz":
            buffer = io.BytesIO()
            np.savez(buffer, **stored)
            path.write_bytes(buffer.getvalue())
        else:
            state = {name: torch.tensor(array) for name, array in stored.items()}
            torch.save({self.select: state} if self.select else state, path)
        return path, str(own)


WORDS = st.sampled_from(["lora_A", "down", "Left", "w1", "a.weight", "x_in"])
SCALE = {
    "alpha/r": lambda r: 3.0 / r,
    "alpha": lambda _: 3.0,
    "alpha/sqrt(r)": lambda r: 3.0 / r**0.5,
    "1": lambda _: 1.0,
}


@st.composite
def written(draw: st.DrawFn, *, weights: bool | None = None) -> Written:
    first = draw(WORDS)
    second = draw(WORDS.filter(lambda word: word != first))
    joint = draw(st.sampled_from([".", "_", "/"]))
    axes = (draw(st.sampled_from(["r in", "in r"])), draw(st.sampled_from(["out r", "r out"])))
    scale = draw(st.sampled_from(sorted(SCALE)))
    container = draw(st.sampled_from(["safetensors", "npz", "torch"]))
    select = draw(st.sampled_from(["", "model"])) if container == "torch" else ""
    prefix = draw(st.sampled_from(["", "wrapped."]))
    frozen = draw(st.booleans()) if weights is None else weights
    lines = [
        'title = "random"',
        f'containers = ["{container}"]',
        f'select = ["{select}"]',
        f'strip = ["{prefix}"]',
        f'scale = "{scale}"',
        *(["alpha = 3"] if scale != "1" else []),
        *(["[weight]", f'name = "{{module}}{joint}frozen"'] if frozen else []),
    ]
    for word, axis in zip((first, second), axes, strict=True):
        escaped = f"{joint}{word}".replace(".", "[.]")
        lines += ["[[tensor]]", f"match = '(?P<module>.+){escaped}'", f'axes = "{axis}"']
    if frozen:
        lines += ["[[ignore]]", "match = '.+frozen'", 'what = "base"', "whole = true"]
    lines += ["[[rename]]", "match = 'layer(?P<n>[0-9]+)'", 'to = "model.layers.{n}.fc"']
    tensors: dict[str, np.ndarray] = {}
    updates: dict[str, np.ndarray] = {}
    copies: dict[str, np.ndarray] = {}
    sizes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
    for place, (rows, columns, rank) in enumerate(draw(st.lists(sizes, min_size=1, max_size=3))):
        random = np.random.default_rng(place)
        a, b = random.normal(size=(rank, columns)), random.normal(size=(rows, rank))
        name = f"{prefix}layer{place}{joint}"
        tensors[name + first] = a if axes[0] == "r in" else a.T.copy()
        tensors[name + second] = b if axes[1] == "out r" else b.T.copy()
        updates[f"model.layers.{place}.fc"] = SCALE[scale](rank) * (b @ a)
        copies[f"{name}frozen"] = random.normal(size=(rows, columns))
    stored = {**tensors, **copies} if frozen else tensors
    toml = "\n".join([*lines, ""])
    return Written(toml, stored, updates, container, select, copies if frozen else {})


def read_in(
    folder: str, case: Written, tensors: dict[str, np.ndarray] | None = None
) -> adapterkit.AdapterTensorSet:
    path, own = case.save(Path(folder), tensors)
    return read_handwritten(path, Options(dialect=own))


PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)


@given(written())
@PATIENT
def test_random_dialects_read_what_was_written(case: Written) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = delta(read_in(folder, case))
        assert found.keys() == case.updates.keys()
        for module, update in case.updates.items():
            assert np.allclose(found[module], update, rtol=1e-12), module


@given(written(), st.data())
@PATIENT
def test_one_more_tensor_is_never_passed_over(case: Written, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["extra", "layer0.gain", "lora"]))
    with tempfile.TemporaryDirectory() as folder:
        more = {**case.tensors, name: np.zeros((2, 2))}
        with pytest.raises(FormatError, match=f"{name}: dialect .* is not explained"):
            read_in(folder, case, more)


def exchanged(case: Written) -> dict[str, np.ndarray]:
    """Store each module's two factors under each other's names."""
    names = [name for name in case.tensors if name not in case.weights]
    pairs = zip(names[::2], names[1::2], strict=True)
    partner = {one: other for pair in pairs for one, other in (pair, pair[::-1])}
    factors = {name: case.tensors[partner[name]] for name in names}
    return {**factors, **case.weights}


def reversed_axes(case: Written) -> dict[str, np.ndarray]:
    """Store every factor turned."""
    factors = {n: t.T.copy() for n, t in case.tensors.items() if n not in case.weights}
    return {**factors, **case.weights}


def both(case: Written) -> dict[str, np.ndarray]:
    """Store the factors turned under each other's names: the update is turned, ranks agree."""
    return {n: t if n in case.weights else t.T.copy() for n, t in exchanged(case).items()}


def square(case: Written) -> bool:
    return all(update.shape[0] == update.shape[1] for update in case.updates.values())


def aligned(case: Written) -> bool:
    """Whether both factors have their rank on the same side, as in B · A."""
    return ('"r in"' in case.toml) == ('"out r"' in case.toml)


@given(written(weights=False).filter(lambda case: not square(case)))
@PATIENT
def test_turned_factors_are_caught_if_one_module_is_not_square(case: Written) -> None:
    swaps = [reversed_axes(case)] + ([exchanged(case)] if aligned(case) else [])
    for tensors in swaps:
        with tempfile.TemporaryDirectory() as folder, pytest.raises(FormatError):
            read_in(folder, case, tensors)


@given(written(weights=True).filter(lambda case: not square(case)))
@PATIENT
def test_a_turned_update_is_caught_by_the_weights_if_one_module_is_not_square(
    case: Written,
) -> None:
    for tensors in (both(case), exchanged(case), reversed_axes(case)):
        with tempfile.TemporaryDirectory() as folder, pytest.raises(FormatError):
            read_in(folder, case, tensors)


def test_a_turned_update_is_caught_by_the_base(tmp_path: Path) -> None:
    base = tmp_path / "config.json"
    base.write_text(json.dumps(LLAMA))
    name = "model.layers.0.mlp.down_proj"
    a, b = np.ones((24, 2)), np.ones((2, 16))
    source = tmp_path / "lora.npz"
    np.savez(source, **{f"{name}_lora_A": b.T, f"{name}_lora_B": a.T})
    assert adapterkit.convert(source, tmp_path / "right", alpha=2, base=base).modules == 1
    np.savez(source, **{f"{name}_lora_A": a, f"{name}_lora_B": b})
    with pytest.raises(IncompatibleBaseError, match="the base has 16 x 24 here"):
        adapterkit.convert(source, tmp_path / "wrong", alpha=2, base=base)


def test_converted_to_gguf_and_back_the_update_is_the_same(tmp_path: Path) -> None:
    base = tmp_path / "config.json"
    base.write_text(json.dumps({**LLAMA, "hidden_size": 32}))
    source = SOUND / "loralib.safetensors"
    report = adapterkit.convert(source, tmp_path / "a.gguf", alpha=8, base=base)
    assert report.max_relative_error <= 1e-6
    wanted = delta(adapterkit.read(source, alpha=8))
    found = delta(adapterkit.read(tmp_path / "a.gguf", base=base))
    assert found.keys() == wanted.keys()
    for module, update in wanted.items():
        assert np.allclose(found[module], update, atol=1e-6)


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


def _blocks(size: str) -> str:
    return (
        '[[blocks]]\nmatch = "(?P<module>.+)"\nslots = ["q"]\nnumbers = "metadata:k"\n'
        f'sizes = {{q = "{size}"}}'
    )


HOSTILE_RULES = {
    "width": '[weight]\nname = "{module:>8000000000}.weight"',
    "nested width": '[weight]\nname = "{module:{module}}.weight"',
    "attribute": '[weight]\nname = "{module}{module.__class__}"',
    "conversion": '[weight]\nname = "{module!r}{module}"',
    "no end": '[weight]\nname = "{module"',
    "many holes": f'[weight]\nname = "{"{module}" * 5000}"',
    "width of unless": '[[tensor]]\nmatch = "(?P<module>.+)B"\naxes = "out r"\n'
    'unless = "{module:>8000000000}"',
    "width of to": '[[rename]]\nmatch = "(?P<module>.+)"\nto = "{module:>8000000000}"',
    "signs": _blocks("-" * 900 + "1"),
    "many signs": _blocks("-" * 60_000 + "1"),
    "brackets": _blocks("(" * 400 + "1" + ")" * 400),
    "many brackets": _blocks("(" * 30_000 + "1" + ")" * 30_000),
    "products": _blocks("*".join(["9007199254740992"] * 50)),
    "digits": _blocks("9" * 900),
    "NUL": _blocks("1\\u0000"),
    "items": _blocks("a" + "[0]" * 300),
    "text": _blocks("'a' * 8000000000"),
}


@pytest.mark.parametrize("name", HOSTILE_RULES)
def test_a_rule_that_would_fill_memory_or_the_stack_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    sound = (
        'title = "x"\ncontainers = ["safetensors"]\nscale = "1"\n',
        '[[tensor]]\nmatch = "(?P<module>.+)A"\naxes = "r in"\n',
    )
    path.write_text("\n".join(sound))
    load(str(path))
    path.write_text(f"{sound[0]}{HOSTILE_RULES[name]}\n{sound[1]}")
    with pytest.raises(FormatError) as caught:
        load(str(path))
    assert len(str(caught.value)) < 2000
