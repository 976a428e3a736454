"""PEFT's tuners without low-rank updates: what is exact, and the way out of what is refused."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from engine import family_row, make_base
from peft import PeftModel, get_peft_model
from small_llama import saved_llama
from transformers import LlamaForCausalLM

import adapterkit
from adapterkit.formats.peft.tuners_refused import MERGE, REFUSED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

transformers.utils.logging.disable_progress_bar()

PROMPT = torch.tensor([[3, 17, 44, 9, 60, 2]])
TARGETS = ["q_proj", "k_proj", "down_proj"]
WANTED = {"IA3": {"target_modules": ["k_proj"], "feedforward_modules": []}}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.24 for a property by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # It wraps norms all the same.
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        warnings.filterwarnings("ignore", "Setting boft_n_butterfly", UserWarning)
        # BOFT looks for a compiler, FRoD for a setting of torch.
        warnings.filterwarnings("ignore", "Failed to load the CUDA extension", UserWarning)
        warnings.filterwarnings("ignore", "Sparse invariant checks", UserWarning)
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("plain"), biased=False)


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with biases, and one table for embedding and output."""
    return made(tmp_path_factory.mktemp("biased"), biased=True)


@pytest.fixture(params=["plain", "biased"])
def base(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def made(folder: Path, *, biased: bool) -> Path:
    def shifted(model: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.2)

    switches = ("tie_word_embeddings", "attention_bias", "mlp_bias")
    return saved_llama(folder, shifted, **dict.fromkeys(switches, biased))


def loaded(base: Path, adapter: Path | None = None) -> Any:
    model = LlamaForCausalLM.from_pretrained(base)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


def tuned(kind: str, base: Path, folder: Path, size: float = 0.3, **settings: Any) -> Path:
    """Save an adapter whose trained tensors are all random, as PEFT saves it."""
    torch.manual_seed(1)
    model = get_peft_model(loaded(base), config_of(kind)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def config_of(kind: str) -> Any:
    """Return the class of a config, in whichever case PEFT spells it."""
    names = {name.lower(): name for name in dir(peft)}
    return getattr(peft, names[f"{kind}config".lower()])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.double().eval()(PROMPT).logits


def apart(got: Any, want: torch.Tensor, base: Path) -> float:
    """Return how far a model's logits are from others, as a share of what an adapter changed."""
    return float((logits(got) - want).norm() / (want - logits(loaded(base))).norm())


EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "ln-tuning": ("LNTuning", {}),
    "tokens": ("TrainableTokens", {"token_indices": [3, 17, 60]}),
    "ia3": ("IA3", {"target_modules": TARGETS, "feedforward_modules": ["down_proj"]}),
}


@pytest.mark.parametrize("name", EXACT)
def test_into_a_base_and_as_a_lora_it_gives_peft_s_logits(
    name: str, base: Path, tmp_path: Path
) -> None:
    kind, settings = EXACT[name]
    check_exact(tuned(kind, base, tmp_path / "tuner", **settings), base, tmp_path)


def test_tokens_of_embedding_and_output_are_two_tables(plain: Path, tmp_path: Path) -> None:
    both = {"token_indices": [3, 17], "target_modules": ["embed_tokens", "lm_head"]}
    check_exact(tuned("TrainableTokens", plain, tmp_path / "tuner", **both), plain, tmp_path)


def test_biases_are_added_to_those_that_are_there(
    plain: Path, biased: Path, tmp_path: Path
) -> None:
    settings = {"target_modules": ["v_proj", "down_proj"]}
    check_exact(tuned("Beft", biased, tmp_path / "tuner", **settings), biased, tmp_path)
    with pytest.warns(UserWarning, match="no bias term"):
        tuned("Beft", plain, tmp_path / "none", **settings)
    with pytest.raises(adapterkit.UnsupportedError, match="the base has none here"):
        adapterkit.merge_into([tmp_path / "none"], plain, tmp_path / "no")


def check_exact(path: Path, base: Path, tmp_path: Path) -> None:
    want = logits(loaded(base, path))
    tied = path.name == "tuner" and loaded(base).config.tie_word_embeddings
    shared = {"tied": "shared"} if tied and "TRAINABLE" in text_of(path) else {}
    adapterkit.merge_into([path], base, tmp_path / "merged", **shared)
    assert apart(loaded(tmp_path / "merged"), want, base) < 1e-5
    adapterkit.convert(path, tmp_path / "lora", base=base)
    assert apart(loaded(base, tmp_path / "lora"), want, base) < 1e-5
    codes = {finding.code for finding in adapterkit.validate(tmp_path / "lora", base=base).findings}
    assert "AK114" not in codes


def text_of(path: Path) -> str:
    return (path / "adapter_config.json").read_text()


@pytest.mark.parametrize("kind", ["HRA", "IA3", "Beft"])
def test_what_multiplies_the_base_asks_for_its_weights(
    kind: str, biased: Path, tmp_path: Path
) -> None:
    path = tuned(kind, biased, tmp_path, **WANTED.get(kind, {"target_modules": ["k_proj"]}))
    (path / "adapter_config.json").write_text(text_of(path).replace(str(biased), ""))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((biased / "config.json").read_bytes())
    for given in (None, bare):
        with pytest.raises(adapterkit.BaseRequiredError, match="with --base"):
            adapterkit.convert(path, tmp_path / "lora", base=given)


@pytest.mark.parametrize("kind", ["HRA", "IA3"])
def test_into_a_gguf_it_goes_by_the_way_that_is_advised(kind: str, tmp_path: Path) -> None:
    base = make_base(family_row("llama"), tmp_path)
    path = tuned(kind, base.hf, tmp_path, **WANTED.get(kind, {"target_modules": ["k_proj"]}))
    advice = (
        "adapterkit convert SRC -o DIR --base MODEL makes an adapter of it that goes into a GGUF"
    )
    with pytest.raises(adapterkit.BaseRequiredError, match=advice):
        adapterkit.merge_into([path], base.gguf, tmp_path / "merged.gguf")
    adapterkit.convert(path, tmp_path / "plain", base=base.hf)
    adapterkit.merge_into([tmp_path / "plain"], base.gguf, tmp_path / "merged.gguf")


# Every kind that PEFT can merge and that has no exact form, with settings for a small model.
REST: dict[str, tuple[str, dict[str, Any]]] = {
    "BOFT": ("BOFT", {"boft_block_size": 4}),
    "C3A": ("C3A", {"block_size": 8}),
    "DEFT": ("Deft", {}),
    "FOURIERFT": ("FourierFT", {"n_frequency": 50}),
    "FROD": ("Frod", {}),
    "GLORA": ("Glora", {}),
    "HIRA": ("Hira", {"r": 4}),
    "OFT": ("OFT", {"oft_block_size": 4}),
    "OSF": ("OSF", {}),
    "PEANUT": ("Peanut", {}),
    "PSOFT": ("PSOFT", {"r": 4}),
    "RANDLORA": ("RandLora", {"r": 4}),
    "ROAD": ("Road", {"group_size": 8}),
    "SHIRA": ("Shira", {"r": 2}),
    "SUPERTUNING": ("Supertuning", {}),
    "UNILORA": ("UniLora", {"r": 4}),
    "WAVEFT": ("Waveft", {"n_frequency": 50}),
}


def test_every_refusal_of_a_change_of_weights_names_the_way_out() -> None:
    assert {kind for kind, reason in REFUSED.items() if MERGE in reason} == {
        *REST,
        "ADAMSS",  # needs scikit-learn
    }


@pytest.mark.parametrize("kind", REST)
def test_the_way_out_is_one(kind: str, plain: Path, tmp_path: Path) -> None:
    """Merged in PEFT, then extracted: the LoRA gives the logits of the live adapter."""
    name, settings = REST[kind]
    targets = {"target_modules": ["q_proj", "down_proj"]}
    path = tuned(name, plain, tmp_path / "tuner", size=0.1, **targets, **settings)
    with pytest.raises(adapterkit.UnsupportedError, match="adapterkit extract --base BASE --tuned"):
        adapterkit.convert(path, tmp_path / "no", base=plain)
    live = loaded(plain, path)
    want = logits(live)
    loaded(plain, path).merge_and_unload().save_pretrained(tmp_path / "merged")
    adapterkit.extract(plain, tmp_path / "merged", tmp_path / "lora")
    assert apart(loaded(plain, tmp_path / "lora"), want, plain) < 2e-4
