"""A proof is small, is all that is added to a file, and nobody who loads it sees it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from proven_files import BASE, TINY, weights
from proven_files import written as written  # noqa: PLC0414  (a fixture)

from adapterkit import convert, verify, write
from adapterkit.certificates import read_certificate
from adapterkit.stamps import BESIDE, KEY, LONGEST, contents, stamp, stamped

pytestmark = pytest.mark.slow


def test_the_proof_is_all_that_is_added(written: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare" / written.name
    bare.parent.mkdir()
    convert(TINY, bare, to=written.name.removeprefix("made-"), base=BASE, proof=False)
    assert contents(bare) == contents(written)
    text = stamped(written)
    assert text is not None
    assert stamped(bare) is None
    stamp(bare, text)
    assert weights(bare).read_bytes() == weights(written).read_bytes()


def test_a_proof_is_not_passed_on(written: Path, tmp_path: Path) -> None:
    """The next file has its own, and without one none."""
    name = written.name.removeprefix("made-")
    convert(written, tmp_path / "next", to=name, base=BASE)
    assert list(verify(tmp_path / "next", base=BASE).sources) == [written.name]
    convert(written, tmp_path / "bare", to=name, base=BASE, proof=False)
    assert stamped(tmp_path / "bare") is None


def test_what_has_no_room_has_it_beside(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "adapter_state.pt").write_bytes(b"state")
    stamp(tmp_path / "made", "text")
    assert (tmp_path / "made" / BESIDE).read_text() == "text\n"
    assert stamped(tmp_path / "made") == "text\n"
    assert contents(tmp_path / "made").settings.keys() == {"adapter_state.pt"}


def test_a_proof_stays_small(tmp_path: Path) -> None:
    """224 modules in 64 kB; what has too many has no list of them, and is checked as a whole."""
    from adapterkit import AdapterTensorSet, Update
    from adapterkit.dtype import DType
    from adapterkit.lowrank.products import stored

    random = np.random.default_rng(0)
    for layers, listed in ((32, True), (128, False)):
        updates = [
            Update(
                f"model.layers.{layer}.{name}",
                stored(random.standard_normal((2, 8)), DType.F32),
                stored(random.standard_normal((8, 2)), DType.F32),
                1.0,
            )
            for layer in range(layers)
            for name in (
                *(f"self_attn.{n}_proj" for n in "qkvo"),
                *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
            )
        ]
        path = tmp_path / str(layers)
        write(AdapterTensorSet.of(updates, {}), path)
        text = stamped(path) or ""
        assert len(text) <= LONGEST
        assert bool(read_certificate(text, path).fingerprint.modules) is listed
        assert verify(path).sound
        file = path / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
        assert not verify(path).sound


@pytest.mark.parametrize("written", ["peft"], indirect=True)
def test_peft_loads_it_in_silence(written: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**json.loads((BASE / "config.json").read_text()))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    tokens = torch.tensor([[1, 5, 9]])
    found: list[Any] = []
    for path in (TINY, written):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5.24 for a property by its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            tuned = PeftModel.from_pretrained(LlamaForCausalLM(config).eval(), path)
        with torch.no_grad():
            found.append(tuned(tokens).logits)
    with torch.no_grad():
        assert not torch.equal(found[0], model(tokens).logits)
    assert torch.equal(*found)


def test_key_is_what_others_do_not_use() -> None:
    assert KEY == "adapterkit.proof"
