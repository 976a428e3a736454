"""LyCORIS files: products written out as LoRA, checked against the products themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_llama import saved_llama

import adapterkit
from adapterkit.base import open_base
from adapterkit.formats.lycoris.reader import is_lycoris, read_lycoris
from adapterkit.formats.protocol import FormatOptions
from adapterkit.registry import detect

if TYPE_CHECKING:
    from pathlib import Path

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.1.self_attn.k_proj"


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([*shape, seed]).normal(size=shape).astype(np.float32)


def number(value: float) -> np.ndarray:
    return np.array(value, dtype=np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("base"))


def loha(rank: int, rows: int, columns: int) -> dict[str, np.ndarray]:
    return {
        "hada_w1_a": drawn(rows, rank),
        "hada_w1_b": drawn(rank, columns),
        "hada_w2_a": drawn(rows, rank, seed=1),
        "hada_w2_b": drawn(rank, columns, seed=1),
    }


def lokr(rows: int, columns: int, *, w1: int = 0, w2: int = 0) -> dict[str, np.ndarray]:
    """A LoKr of 4 x 4 blocks; `w1` and `w2` are the ranks of its matrices, 0 for whole ones."""
    parts: dict[str, np.ndarray] = {}
    for name, rank, shape in (("w1", w1, (4, 4)), ("w2", w2, (rows // 4, columns // 4))):
        if rank:
            parts[f"lokr_{name}_a"] = drawn(shape[0], rank)
            parts[f"lokr_{name}_b"] = drawn(rank, shape[1])
        else:
            parts[f"lokr_{name}"] = drawn(*shape)
    return parts


def locon(rank: int, rows: int, columns: int) -> dict[str, np.ndarray]:
    return {"lora_up.weight": drawn(rows, rank), "lora_down.weight": drawn(rank, columns)}


def product(parts: dict[str, np.ndarray]) -> np.ndarray:
    """Return the update as LyCORIS's get_weight makes it, without its scale."""
    wide = {name: x.astype(np.float64) for name, x in parts.items()}
    if "hada_w1_a" in wide:
        first = wide["hada_w1_a"] @ wide["hada_w1_b"]
        return first * (wide["hada_w2_a"] @ wide["hada_w2_b"])
    if "lora_up.weight" in wide:
        return wide["lora_up.weight"] @ wide["lora_down.weight"]
    w1, w2 = (
        wide[f"lokr_{n}"] if f"lokr_{n}" in wide else wide[f"lokr_{n}_a"] @ wide[f"lokr_{n}_b"]
        for n in ("w1", "w2")
    )
    rows = [np.concatenate([w1[i, j] * w2 for j in range(w1.shape[1])], 1) for i in range(len(w1))]
    return np.concatenate(rows)


# parts, alpha, the scale that LyCORIS applies
CASES: dict[str, tuple[dict[str, np.ndarray], float | None, float]] = {
    "loha": (loha(3, 32, 32), 2.0, 2 / 3),
    "loha-no-alpha": (loha(3, 32, 32), None, 1.0),
    "loha-alpha-zero": (loha(3, 32, 32), 0.0, 1.0),
    "loha-more-than-full-rank": (loha(7, 32, 32), 2.0, 2 / 7),
    "lokr": (lokr(32, 32, w2=2), 3.0, 1.5),
    "lokr-both": (lokr(32, 32, w1=1, w2=1), 3.0, 3.0),
    "lokr-w1-only": (lokr(32, 32, w1=2), 3.0, 1.5),
    "lokr-whole": (lokr(32, 32), 3.0, 1.0),
    "locon": (locon(4, 32, 32), 2.0, 0.5),
}


def written(folder: Path, module: str, parts: dict[str, Any], alpha: float | None) -> Path:
    named = {f"lycoris_{module.replace('.', '_')}.{leaf}": x for leaf, x in parts.items()}
    if alpha is not None:
        named[f"lycoris_{module.replace('.', '_')}.alpha"] = number(alpha)
    save_file(named, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


@pytest.mark.parametrize(("parts", "alpha", "scale"), CASES.values(), ids=CASES)
def test_factors_multiply_to_the_product(
    parts: dict[str, np.ndarray], alpha: float | None, scale: float, base: Path, tmp_path: Path
) -> None:
    path = written(tmp_path, Q, parts, alpha)
    assert detect(path).name == "lycoris"
    (pair,) = read_lycoris(path, FormatOptions(base=open_base(base))).pairs()
    assert pair.module == Q
    assert pair.scale == pytest.approx(scale, rel=1e-12)
    want = product(parts)
    got = pair.b.numpy().astype(float) @ pair.a.numpy().astype(float)
    assert np.linalg.norm(got - want) < 1e-7 * np.linalg.norm(want)
    assert pair.rank <= min(want.shape)


def test_modules_have_scales_of_their_own(base: Path, tmp_path: Path) -> None:
    named: dict[str, np.ndarray] = {}
    for module, parts, alpha in ((Q, loha(3, 32, 32), 6.0), (K, lokr(16, 32, w2=2), 1.0)):
        stem = f"lora_unet_{module.replace('.', '_')}"
        named |= {f"{stem}.{leaf}": x for leaf, x in parts.items()}
        named[f"{stem}.alpha"] = number(alpha)
    save_file(named, tmp_path / "x.safetensors", {"ss_network_dim": "3"})
    adapter = read_lycoris(tmp_path / "x.safetensors", FormatOptions(base=open_base(base)))
    assert dict(adapter.scales) == {Q: 2.0, K: 0.5}
    assert adapter.metadata["ss_network_dim"] == "3"
    report = adapterkit.convert(tmp_path / "x.safetensors", tmp_path / "peft", base=base)
    assert (report.source_format, report.modules) == ("lycoris", 2)


def test_names_are_told_from_a_config_alone(base: Path, tmp_path: Path) -> None:
    path = written(tmp_path, Q, loha(3, 32, 32), 2.0)
    assert read_lycoris(path, FormatOptions(base=open_base(base / "config.json"))).modules == (Q,)


def test_dotted_names_need_no_base(tmp_path: Path) -> None:
    save_file({f"lycoris.{Q}.{x}": y for x, y in loha(2, 8, 8).items()}, tmp_path / "x.safetensors")
    assert read_lycoris(tmp_path / "x.safetensors", FormatOptions()).modules == (Q,)


def test_underscored_names_need_the_base(tmp_path: Path) -> None:
    path = written(tmp_path, Q, loha(2, 8, 8), None)
    with pytest.raises(adapterkit.BaseRequiredError, match="--base"):
        adapterkit.inspect(path)


def test_a_module_that_the_base_lacks_is_refused(base: Path, tmp_path: Path) -> None:
    path = written(tmp_path, "model.layers.2.self_attn.q_proj", loha(2, 8, 8), None)
    with pytest.raises(adapterkit.IncompatibleBaseError, match="has no such module"):
        read_lycoris(path, FormatOptions(base=open_base(base)))


REFUSED: dict[str, tuple[dict[str, np.ndarray], type[Exception], str]] = {
    "tucker": (
        {**loha(2, 8, 8), "hada_t1": drawn(2, 2, 3, 3)},
        adapterkit.UnsupportedError,
        "convolution .hada_t1",
    ),
    "dora": (
        {**loha(2, 8, 8), "dora_scale": drawn(8, 1)},
        adapterkit.UnsupportedError,
        "dora_scale",
    ),
    "oft": (
        {**loha(2, 8, 8), "oft_blocks": drawn(2, 4, 4)},
        adapterkit.UnsupportedError,
        "no low-rank update",
    ),
    "half": (
        {key: x for key, x in loha(2, 8, 8).items() if key != "hada_w2_b"},
        adapterkit.FormatError,
        "has no hada_w2_b",
    ),
    "shape": (
        {**loha(2, 8, 8), "hada_w2_b": drawn(2, 9)},
        adapterkit.FormatError,
        "input sizes disagree",
    ),
    "convolution": (
        {**lokr(8, 8), "lokr_w2": drawn(2, 2, 3, 3)},
        adapterkit.FormatError,
        "not that of a matrix",
    ),
    "alpha": (
        {**loha(2, 8, 8), "alpha": drawn(2)},
        adapterkit.FormatError,
        "alpha has shape",
    ),
}


@pytest.mark.parametrize(("parts", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_linear_lora_is_refused_by_name(
    parts: dict[str, np.ndarray], error: type[Exception], message: str, base: Path, tmp_path: Path
) -> None:
    path = written(tmp_path, Q, parts, None)
    with pytest.raises(error, match=message) as caught:
        read_lycoris(path, FormatOptions(base=open_base(base)))
    assert "q_proj" in str(caught.value)


def test_plain_lora_files_are_not_claimed(tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_up.weight": drawn(4, 2)}, tmp_path / "x.safetensors")
    assert not is_lycoris(tmp_path / "x.safetensors")
    save_file({"lycoris_x.lora_down.weight": drawn(2, 4)}, tmp_path / "y.safetensors")
    assert is_lycoris(tmp_path / "y.safetensors")
