"""The doctor: real llama.cpp servers on loopback, and what is made of their answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import transformers
from click.testing import CliRunner
from engine import AdapterFixture, convert_adapter, family_row, make_adapter, make_base
from llama_server import served
from pretend_servers import softmax

from adapterkit import Condition, examine
from adapterkit.containers.gguf import read_gguf, write_gguf
from adapterkit.containers.gguf_values import float32
from adapterkit.doctor.distributions import Measured, divergence, measured
from adapterkit.doctor.examination import judged
from adapterkit.dtype import DType
from adapterkit.errors import UncheckableError, UsageError
from adapterkit.lowrank.products import stored
from adapterkit_cli.main import cli

pytestmark = pytest.mark.slow

HEADS = 4


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> AdapterFixture:
    folder = tmp_path_factory.mktemp("doctor")
    base = make_base(family_row("llama"), folder)
    return make_adapter(base, folder / "adapter", target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def healthy(tuned: AdapterFixture) -> Path:
    path = tuned.path.parent / "healthy.gguf"
    convert_adapter(tuned.path, tuned.base, path)
    return path


def changed(source: Path, name: str, change: Callable[[str, Any], Any], alpha: float = 1.0) -> Path:
    """Write an adapter as a program with a fault would."""
    file = read_gguf(source)
    metadata = file.typed()
    metadata["adapter.lora.alpha"] = float32(float(file.metadata["adapter.lora.alpha"]) * alpha)
    tensors = {
        key: stored(change(key, np.asarray(tensor.numpy(), np.float64)), DType.F32)
        for key, tensor in file.tensors.items()
    }
    path = source.with_name(f"{name}.gguf")
    path.unlink(missing_ok=True)
    write_gguf(path, metadata, tensors)
    return path


def unpermuted(name: str, values: Any) -> Any:
    if "attn_q" not in name or not name.endswith("lora_b"):
        return values
    rows = values.shape[0]
    return values.reshape(HEADS, rows // HEADS // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


FAULTS: dict[str, tuple[Callable[[str, Any], Any], float, Condition, str]] = {
    "healthy": (lambda _, values: values, 1.0, Condition.RIGHT, ""),
    "dead": (
        lambda name, values: values * (not name.endswith("lora_b")),
        1.0,
        Condition.NO_EFFECT,
        "",
    ),
    "quarter": (lambda _, values: values, 0.25, Condition.STRENGTH, ""),
    "double": (lambda _, values: values, 2.0, Condition.STRENGTH, ""),
    "unpermuted": (unpermuted, 1.0, Condition.ANOTHER, "rows of q_proj are not"),
    "no-q": (
        lambda name, values: values * ("attn_q" not in name),
        1.0,
        Condition.ANOTHER,
        "nothing of q_proj",
    ),
    "turned": (
        lambda name, values: values * (-1 if name.endswith("lora_b") else 1),
        1.0,
        Condition.ANOTHER,
        "",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named(fault: str, tuned: AdapterFixture, healthy: Path) -> None:
    change, alpha, condition, cause = FAULTS[fault]
    path = changed(healthy, fault, change, alpha)
    with served(tuned.base.gguf, [(path, 1.0)]) as url:
        report = examine(url, source=tuned.path, base=tuned.base.gguf)
        assert report.condition is condition
        assert report.healthy is (condition is Condition.RIGHT)
        assert any(cause in each for each in report.causes) or not cause
        if condition is Condition.STRENGTH:
            assert report.strength == pytest.approx(alpha, rel=0.1)
        # Without the source no more is said than can be known.
        alone = examine(url)
        dead = condition is Condition.NO_EFFECT
        assert alone.condition is (Condition.NO_EFFECT if dead else Condition.ALIVE)


def test_the_servers_own_scale_counts(tuned: AdapterFixture, healthy: Path) -> None:
    with served(tuned.base.gguf, [(healthy, 0.25)]) as url:
        report = examine(url, source=healthy, base=tuned.base.gguf)
    assert report.condition is Condition.STRENGTH
    assert report.strength == pytest.approx(0.25, abs=0.03)
    assert "own scale for it is 0.25" in report.notes[0]


def test_another_adapter_and_one_of_several(tuned: AdapterFixture, healthy: Path) -> None:
    folder = healthy.parent / "another"
    other = make_adapter(tuned.base, folder, seed=9, target_modules=["q_proj", "v_proj"])
    path = healthy.with_name("another.gguf")
    convert_adapter(other.path, tuned.base, path)
    with served(tuned.base.gguf, [(healthy, 1.0), (path, 1.0)]) as url:
        with pytest.raises(UsageError, match=r"several adapters: 0 \(.*healthy\.gguf\)"):
            examine(url)
        for name, condition in (("healthy", Condition.RIGHT), ("1", Condition.ANOTHER)):
            report = examine(url, name=name, source=tuned.path, base=tuned.base.gguf)
            assert report.condition is condition
        with pytest.raises(UsageError, match="no one adapter 'nobody'"):
            examine(url, name="nobody")


def test_another_base(tuned: AdapterFixture, healthy: Path, tmp_path: Path) -> None:
    other = make_base(family_row("llama"), tmp_path, seed=7)
    with served(other.gguf, [(healthy, 1.0)]) as url:
        report = examine(url, source=tuned.path, base=tuned.base.gguf)
    assert report.condition is Condition.BASE


def test_healthy_servers_raise_no_alarm(tuned: AdapterFixture, healthy: Path) -> None:
    for settings in ({"n_batch": 8}, {"flash_attn_type": "LLAMA_FLASH_ATTN_TYPE_DISABLED"}):
        with served(tuned.base.gguf, [(healthy, 1.0)], **settings) as url:
            assert examine(url, source=tuned.path, base=tuned.base.gguf).healthy


# What to expect, computed by transformers and PEFT.


# PEFT 0.21 asks transformers 5.24 for a property by its old name.
PEFTS_OWN = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def with_tokenizer(tuned: AdapterFixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the base's directory with a tokenizer that agrees with its GGUF file: bytes."""
    folder = tmp_path_factory.mktemp("transformers") / "base"
    shutil.copytree(tuned.base.hf, folder)
    fields = gguf.GGUFReader(tuned.base.gguf).fields
    words = fields["tokenizer.ggml.tokens"].contents()
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    model = tokenizers.models.BPE(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        unk_token=named["unk_token"],
        byte_fallback=True,
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.index("<s>"))]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **named).save_pretrained(folder)
    return folder


@PEFTS_OWN
def test_transformers_and_peft_say_what_to_expect(
    tuned: AdapterFixture, healthy: Path, with_tokenizer: Path
) -> None:
    for scale, condition in ((1.0, Condition.RIGHT), (0.25, Condition.STRENGTH)):
        with served(tuned.base.gguf, [(healthy, scale)]) as url:
            report = examine(url, source=tuned.path, base=with_tokenizer)
        assert report.condition is condition
        assert report.strength == pytest.approx(scale, rel=0.1)
    broken = changed(healthy, "rows", unpermuted)
    with served(tuned.base.gguf, [(broken, 1.0)]) as url:
        # An adapter of another format is the same adapter.
        assert examine(url, source=healthy, base=with_tokenizer).condition is Condition.ANOTHER
    with served(tuned.base.gguf, [(healthy, 1.0)]) as url:
        assert examine(url, source=healthy, base=with_tokenizer).condition is Condition.RIGHT


def test_nothing_but_the_answer_reaches_who_asks_by_transformers(
    tuned: AdapterFixture, healthy: Path, with_tokenizer: Path
) -> None:
    told = ["--source", str(tuned.path), "--base", str(with_tokenizer)]
    with served(tuned.base.gguf, [(healthy, 1.0)]) as url:
        run = subprocess.run(
            [sys.executable, "-m", "adapterkit", "doctor", url, *told],
            capture_output=True,
            text=True,
            check=False,
        )
    assert all(line.startswith("note: ") for line in run.stderr.splitlines()), run.stderr
    assert run.returncode == 0
    assert run.stdout.startswith("right: the adapter does what it should\n")


@PEFTS_OWN
def test_transformers_name_another_base_and_want_a_tokenizer(
    tuned: AdapterFixture, healthy: Path, with_tokenizer: Path, tmp_path: Path
) -> None:
    other = make_base(family_row("llama"), tmp_path, seed=7)
    with served(other.gguf, [(healthy, 1.0)]) as url:
        report = examine(url, source=tuned.path, base=with_tokenizer)
    assert report.condition is Condition.BASE
    with (
        served(tuned.base.gguf, [(healthy, 1.0)]) as url,
        pytest.raises(UncheckableError, match="transformers does not take it"),
    ):
        examine(url, source=tuned.path, base=tuned.base.hf)


def test_the_program(tuned: AdapterFixture, healthy: Path, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("one two\n\nthree\n")
    with served(tuned.base.gguf, [(healthy, 0.25)]) as url:
        line = ["doctor", url, "--prompts", str(lines)]
        told = ["--source", str(tuned.path), "--base", str(tuned.base.gguf), "--from", "peft"]
        run = CliRunner().invoke(cli, [*line, *told])
        assert run.exit_code == 1
        assert "wrong strength: the adapter acts at 0.2" in run.output
        document = json.loads(CliRunner().invoke(cli, [*line, "--json"]).stdout)
    assert (document["condition"], document["prompts"]) == ("alive", 2)


# The arithmetic.


def told(logarithms: Any, count: int) -> dict[int | str, float]:
    return {int(token): float(logarithms[token]) for token in np.argsort(-logarithms)[:count]}


def test_a_divergence_of_all_tokens_is_the_true_one_and_of_some_no_more() -> None:
    random = np.random.default_rng(0)
    p, q = softmax(random.standard_normal((2, 200)) * 2)
    exact = float(np.sum(np.exp(p) * (p - q)))
    assert divergence(told(p, 200), told(q, 200)) == pytest.approx(exact)
    assert 0 < divergence(told(p, 20), told(q, 200)) <= exact
    assert divergence(told(p, 20), told(p, 200)) == pytest.approx(0, abs=1e-9)


def test_strengths_are_found_between_those_computed() -> None:
    random = np.random.default_rng(1)
    base, effect = random.standard_normal((5, 300)) * 2, random.standard_normal((5, 300)) * 2

    def at(strength: float, count: int = 300) -> list[dict[int | str, float]]:
        return [told(row, count) for row in softmax(base + strength * effect)]

    for strength in (0.05, 0.25, 0.3, 0.95, 1.0, 1.2, 1.8):
        found = measured(at(0.0, 20), at(strength, 20), at)
        assert found.strength == pytest.approx(strength, rel=0.15)
        assert found.unexplained < 0.1
        right = 0.9 < strength < 1.25
        assert judged(found) is (Condition.RIGHT if right else Condition.STRENGTH)


@pytest.mark.parametrize(
    ("base", "effect", "distance", "strength", "condition"),
    [
        # (measured on SmolLM2 with known faults, an expected effect of 5.2)
        (0.009, 5.12, 0.008, 1.00, Condition.RIGHT),
        (0.083, 5.11, 0.22, 1.03, Condition.RIGHT),
        (0.0, 0.0, 0.0, 0.0, Condition.NO_EFFECT),
        (0.0, 0.202, 0.006, 0.23, Condition.STRENGTH),
        (0.0, 2.90, 0.65, 0.60, Condition.ANOTHER),
        (0.0, 0.016, 0.016, 0.0, Condition.ANOTHER),
        (1.12, 4.15, 0.98, 0.77, Condition.BASE),
    ],
)
def test_rules(
    base: float, effect: float, distance: float, strength: float, condition: Condition
) -> None:
    numbers = Measured(base=base, effect=effect, expected=5.2, distance=distance, strength=strength)
    assert judged(numbers) is condition
