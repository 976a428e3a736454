"""`validate` on every kind of base, on broken adapters, and as the command line shows it."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from terminal import PEFT, ROOT, invoke

import adapterkit
from adapterkit import LazyTensor, Outcome, Verdict, convert, validate
from adapterkit.containers.gguf import uint32, write_gguf
from adapterkit.containers.safetensors import read_safetensors, write_safetensors
from adapterkit.errors import AdapterKitError, FormatError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

TINY, BASE = PEFT / "tiny", PEFT / "base"
CODES = ROOT / "fixtures" / "validation"
CONFIG: dict[str, Any] = json.loads((BASE / "config.json").read_text())
WIDTHS = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}


def named(layers: int = 2) -> dict[str, tuple[int, int]]:
    shapes = {"model.embed_tokens": (16, 32), "lm_head": (16, 32)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{name}": shape for name, shape in WIDTHS.items()}
        shapes |= {f"{block}.mlp.{name}_proj": (48, 32) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj"] = (32, 48)
    return shapes


def index(folder: Path, names: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def base_folder(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def shard(path: Path, shapes: dict[str, tuple[int, int]], suffix: str = ".weight") -> None:
    kind = np.uint8 if suffix == ".weight" and path.name.startswith("packed") else np.float32
    tensors = {name + suffix: LazyTensor.of(np.zeros(s, kind)) for name, s in shapes.items()}
    write_safetensors(path, tensors, {"format": "pt"})


def codes(base: Path, source: Path = TINY) -> list[str]:
    return [finding.code for finding in validate(source, base=base).findings]


def test_sharded_base(tmp_path: Path) -> None:
    base, shapes = base_folder(tmp_path / "base"), named()
    parts = [dict(list(shapes.items())[:5]), dict(list(shapes.items())[5:])]
    for number, part in enumerate(parts):
        shard(base / f"{number}.safetensors", part)
    weights = {f"{n}.weight": f"{i}.safetensors" for i, part in enumerate(parts) for n in part}
    index(base, weights)
    assert codes(base) == []
    # The stored shape counts, whatever the config says.
    base_folder(base, num_key_value_heads=1)
    assert codes(base) == []
    # A shard that is missing leaves the config to tell.
    (base / "0.safetensors").unlink()
    assert codes(base) == ["AK304"]


def test_index_alone_names_what_there_is(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    names = [f"{name}.weight" for name in named()]
    index(base, dict.fromkeys(names, "model-00001-of-00001.safetensors"))
    assert codes(base) == []
    names.remove("model.layers.1.mlp.down_proj.weight")
    index(base, dict.fromkeys(names, "model-00001-of-00001.safetensors"))
    report = validate(TINY, base=base)
    assert [(f.code, *f.modules) for f in report.findings] == [
        ("AK303", "model.layers.1.mlp.down_proj")
    ]
    # An index cannot lead out of its directory.
    index(base, dict.fromkeys(names, "../../../etc/passwd"))
    assert codes(base) == ["AK303"]


def test_quantised_bases_have_logical_shapes(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    packed = {name: (rows * columns // 2, 1) for name, (rows, columns) in named().items()}
    shard(base / "packed.safetensors", packed)  # bitsandbytes: bytes of two halves
    index(base, dict.fromkeys((f"{name}.weight" for name in packed), "packed.safetensors"))
    assert codes(base) == []
    gptq = base_folder(tmp_path / "gptq")
    shard(gptq / "model.safetensors", packed, ".qweight")
    assert codes(gptq) == []
    wide = base_folder(tmp_path / "gptq", hidden_size=64)
    assert set(codes(wide)) == {"AK304"}


def test_what_to_do_is_said_once(tmp_path: Path) -> None:
    sizes = {"block_count": 2, "embedding_length": 63, "attention.head_count": 9}
    tensors = {
        f"blk.{layer}.attn_{name}.weight": LazyTensor.of(np.zeros((63, 63), np.float32))
        for layer in range(2)
        for name in "qkv"
    }
    kept: dict[str, Any] = {f"llama.{name}": uint32(value) for name, value in sizes.items()}
    write_gguf(tmp_path / "nine.gguf", {"general.architecture": "llama"} | kept, tensors)
    findings = validate(TINY, base=tmp_path / "nine.gguf").findings
    asked = [finding for finding in findings if finding.hint == "is it the right base?"]
    assert any("do not divide by heads = 9" in finding.message for finding in asked)
    assert all(finding.hint not in finding.message for finding in asked)


def test_cached_hub_id_is_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--example--tiny-llama" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    shutil.copy(BASE / "config.json", snapshot)
    assert validate(TINY).findings == ()  # the one that the adapter names
    assert validate(TINY, base="example/tiny-llama").findings == ()
    (snapshot / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 1}))
    assert {f.code for f in validate(TINY).findings} == {"AK302"}


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_text_adapter_on_a_multimodal_base_is_a_silent_no_op(prefix: str, tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    shutil.copytree(CODES / "sound", source)
    weights = source / "adapter_model.safetensors"
    stored = read_safetensors(weights).tensors
    tensors = {
        name.replace("model.model.model.", f"model.model.{prefix}"): LazyTensor.of(t.numpy().copy())
        for name, t in stored.items()
    }
    write_safetensors(weights, tensors, {"format": "pt"})
    report = validate(source, base=CODES / "bases" / "multimodal", targets=["vllm"])
    outcomes = {module.outcome for module in report.targets[0].modules}
    silent = prefix == "model."
    assert outcomes == {Outcome.IGNORED if silent else Outcome.APPLIED}
    assert ("AK501" in {finding.code for finding in report.findings}) is silent


SHAPES = [(), (0,), (4,), (1, 1), (0, 4), (4, 0), (3, 5), (2, 3, 4), (4, 32, 1, 1), (32, 4)]


@pytest.mark.parametrize("seed", range(40))
def test_broken_adapters_are_reported_and_never_crash(seed: int, tmp_path: Path) -> None:
    """Shapes, types and halves at random, read as PEFT and on every kind of engine."""
    chance = random.Random(seed)  # noqa: S311  (no secret)
    source = tmp_path / "adapter"
    shutil.copytree(chance.choice([TINY, PEFT / "patterns", PEFT / "dora"]), source)
    weights = source / "adapter_model.safetensors"
    stored = read_safetensors(weights).tensors
    tensors = {name: LazyTensor.of(t.numpy().copy()) for name, t in stored.items()}
    for name in chance.sample(sorted(tensors), chance.randint(1, 3)):
        if chance.random() < 0.3:
            del tensors[name]
        else:
            kind = chance.choice([np.float32, np.float64, np.int32, np.float16])
            tensors[name] = LazyTensor.of(np.ones(chance.choice(SHAPES), kind))
    write_safetensors(weights, tensors, {"format": "pt"})
    report = validate(source, base=BASE, targets=["llama.cpp", "vllm", "peft", "mlx"])
    assert report.exit_code == 1


def test_unreadable_files_are_errors_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(FormatError):
        validate(tmp_path / "cut.gguf", base=BASE)
    for source in (tmp_path / "cut.gguf", tmp_path / "nothing"):
        assert invoke("validate", source).exit_code == 3
    assert invoke("validate", TINY, "--base", tmp_path / "nothing").exit_code == 3
    assert invoke("validate", TINY, "--target", "hal").exit_code == 2
    assert invoke("validate").exit_code == 2


@pytest.mark.parametrize("path", sorted((ROOT / "fixtures" / "hostile").glob("*/*")), ids=str)
def test_hostile_files_end_in_findings_or_in_an_error_of_ours(path: Path) -> None:
    try:
        report = validate(path, base=BASE, targets=["llama.cpp"])
    except AdapterKitError:
        return
    assert report.exit_code in {0, 1, 5}


def test_neither_torch_nor_weights_of_the_base_are_needed(tmp_path: Path) -> None:
    script = (
        "import sys; from adapterkit import validate; validate(*sys.argv[1:2], base=sys.argv[2])"
    )
    script += "; print(*sorted({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", script, TINY, BASE],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout == "\n"


def test_json_has_the_keys_that_others_rely_on(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "tiny.gguf", base=BASE)
    done = invoke(
        "validate", tmp_path / "tiny.gguf", "--base", BASE, "--target", "llama.cpp", "--json"
    )
    content = json.loads(done.stdout)
    assert content["schema"] == 2
    (report,) = content["results"]
    assert report["findings"] == []
    (engine,) = report["targets"]
    assert (engine["engine"], engine["verdict"]) == ("llama.cpp", "applied")
    assert set(engine["coverage"]) == {"applied", "ignored", "refused", "unmatched"}
    assert len(engine["coverage"]["applied"]) == 6
    assert engine["modules"][0]["tensor"].startswith("blk.")
    wide = invoke("validate", TINY, "--base", PEFT / "wider-base", "--json")
    finding = json.loads(wide.stdout)["results"][0]["findings"][0]
    assert {"code", "severity", "engine", "modules", "message", "hint"} <= finding.keys()


def test_sarif_points_every_result_to_its_rule() -> None:
    done = invoke("validate", CODES / "AK401", "--base", PEFT / "wider-base", "--sarif")
    document = json.loads(done.stdout)
    assert document["version"] == "2.1.0"
    (run,) = document["runs"]
    rules = run["tool"]["driver"]["rules"]
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in {"error", "warning", "note"}
        assert result["message"]["text"]
    found = {result["ruleId"] for result in run["results"]}
    assert found == {"AK304", "AK309", "AK401"}


def test_same_report_from_every_format(tmp_path: Path) -> None:
    for name, to in (("tiny.gguf", "gguf"), ("mlx", "mlx")):
        adapterkit.convert(TINY, tmp_path / name, to=to, base=BASE)
        assert codes(BASE, tmp_path / name) == []
        assert set(codes(PEFT / "wider-base", tmp_path / name)) == {"AK304"}
    report = validate(tmp_path / "tiny.gguf", base=BASE, targets=["llama.cpp"])
    assert report.targets[0].verdict is Verdict.APPLIED
