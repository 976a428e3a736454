"""PEFT as the oracle where it is right, and what it does where it is not."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import merge_oracle as oracle
import numpy as np
import peft
import pytest
import torch
from peft.utils import merge_utils
from small_llama import small_llama

from adapterkit import merge, merge_files
from adapterkit.errors import LossyConversionError
from adapterkit.keys import FACTORS

if TYPE_CHECKING:
    from pathlib import Path

RANK = 4
TARGETS = ["q_proj", "v_proj", "down_proj"]
WEIGHTS = [0.7, -0.4]


def base_model() -> Any:
    return small_llama(pad_token_id=0, attention_bias=True, mlp_bias=True)


def save(folder: Path, seed: int, **settings: Any) -> Path:
    """Save a random adapter of the base model."""
    config = peft.LoraConfig(
        init_lora_weights=False,
        **{
            "r": RANK,
            "lora_alpha": 6,
            "task_type": "CAUSAL_LM",
            "target_modules": TARGETS,
            **settings,
        },
    )
    with Quiet():
        model = peft.get_peft_model(base_model(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    with Quiet():
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


class Quiet(warnings.catch_warnings):
    """Without what PEFT 0.21 says of a property's old name, and of a bias: it takes it for a B."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "Adapter 'default': 6 LoRA tensor")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("peft")
    return {
        "a": save(root / "a", 1),
        "b": save(root / "b", 2, lora_alpha=8),
        "rslora": save(root / "rslora", 3, use_rslora=True),
        "small": save(root / "small", 4, r=2, target_modules=["q_proj", "up_proj"]),
        "biased": save(root / "biased", 5, lora_bias=True),
    }


@pytest.fixture
def loaded(folders: dict[str, Path]) -> Any:
    with Quiet():
        model = peft.PeftModel.from_pretrained(base_model(), folders["a"], adapter_name="a")
        for name in ("b", "rslora"):
            model.load_adapter(folders[name], adapter_name=name)
    return model.eval()


def peft_deltas(model: Any, name: str) -> dict[str, Any]:
    """Return ΔW of every module of one loaded adapter."""
    prefix = "base_model.model."
    return {
        path.removeprefix(prefix): module.get_delta_weight(name).detach().double().numpy()
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and name in module.lora_A
    }


def read(path: Path) -> Any:
    from adapterkit.formats.protocol import FormatOptions
    from adapterkit.registry import detect

    return detect(path).read(path, FormatOptions())


@pytest.mark.parametrize(
    ("theirs", "ours", "more"),
    [
        ("cat", "cat", {}),
        ("cat", "svd", {}),
        ("svd", "svd", {"rank": 3}),
        ("svd", "svd", {"rank": 8}),
        ("linear", "linear-peft", {}),
    ],
)
def test_equals_add_weighted_adapter(
    loaded: Any, folders: dict[str, Path], theirs: str, ours: str, more: dict[str, Any]
) -> None:
    options = {"svd_rank": more["rank"]} if more else {}
    loaded.add_weighted_adapter(["a", "b"], WEIGHTS, "m", combination_type=theirs, **options)
    merged = merge([read(folders[n]) for n in "ab"], weights=WEIGHTS, method=ours, **more).adapter
    wanted, found = peft_deltas(loaded, "m"), oracle.deltas(merged)
    assert found.keys() == wanted.keys()
    # PEFT decomposes in float32.
    assert all(oracle.relative(found[m], wanted[m]) < 2e-5 for m in wanted)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_rules_equal_the_functions_of_merge_utils(density: float) -> None:
    shapes = {"q": (24, 20)}
    parts = [oracle.random_parts(seed, shapes, 3) for seed in (1, 2, 3)]
    adapters = [oracle.adapter(part) for part in parts]
    tensors = [torch.tensor(b @ a) for part in parts for b, a, _ in part.values()]
    options: dict[str, Any] = {"density": density, "rank": 20}
    weights = torch.tensor([0.5, -0.25, 2.0], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density 1.0", UserWarning)
        pruned = merge_utils.magnitude_prune(tensors, weights, density)
        # Weights of one each: theirs are ratios that are not divided by their sum.
        ties = merge_utils.ties(tensors, torch.ones(3, dtype=torch.float64), density)
    found = merge(adapters, weights=weights.tolist(), method="magnitude-prune", **options).adapter
    assert oracle.relative(oracle.deltas(found)["q"], pruned.numpy()) < 1e-12
    found = merge(adapters, method="ties", **options).adapter
    assert oracle.relative(oracle.deltas(found)["q"], ties.numpy()) < 1e-12


def logits(model: Any) -> Any:
    tokens = torch.tensor([[3, 14, 15, 9, 2, 6]])
    with torch.no_grad():
        return model(tokens).logits.double().numpy()


@pytest.mark.parametrize(
    ("names", "weights"),
    [(("a", "b"), (0.7, -0.4)), (("rslora", "small"), (1.0, 0.5)), (("a", "biased"), (0.6, 0.8))],
)
def test_a_merged_adapter_in_peft_is_the_sum_of_its_sources(
    folders: dict[str, Path], tmp_path: Path, names: tuple[str, str], weights: tuple[float, float]
) -> None:
    merge_files([folders[name] for name in names], tmp_path / "m", weights=weights)
    with Quiet():
        merged = peft.PeftModel.from_pretrained(base_model(), tmp_path / "m").eval()
    # The reference adds every update and bias to the weights, in float64 and by hand.
    reference = base_model()
    with Quiet(), torch.no_grad():
        for name, weight in zip(names, weights, strict=True):
            tuned = peft.PeftModel.from_pretrained(base_model(), folders[name])
            for path, module in tuned.named_modules():
                if not hasattr(module, "get_delta_weight"):
                    continue
                target = reference.get_submodule(path.removeprefix("base_model.model."))
                target.weight += weight * module.get_delta_weight("default")
                bias = module.lora_B["default"].bias
                if bias is not None:
                    target.bias += weight * module.scaling["default"] * bias
    found, wanted, plain = logits(merged), logits(reference), logits(base_model())
    assert np.abs(wanted - plain).max() > 0.01
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        ("lm_head", {"modules_to_save": ["lm_head"]}),
        ("model.embed_tokens", {"modules_to_save": ["embed_tokens"]}),
        ("model.embed_tokens", {"trainable_token_indices": [5, 9]}),
    ],
)
def test_a_module_that_sources_train_in_two_ways_is_refused(
    module: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT loads one of the two, and leaves the other out without a word."""
    whole = save(tmp_path / "whole", 1, **settings)
    factors = save(tmp_path / "factors", 2, target_modules=["q_proj", module.rpartition(".")[2]])
    with pytest.raises(LossyConversionError, match=f"{module}: in PEFT a module has either"):
        merge_files([whole, factors], tmp_path / "m")
    merge_files([whole, factors], tmp_path / "m", allow_lossy=True)
    apart = read(whole)
    pairs = {key: tensor for key, tensor in apart.tensors.items() if key.role in FACTORS}
    merge_files([apart.replace(tensors=pairs, token_indices=()), factors], tmp_path / "pairs")
    with Quiet():
        lossy, wanted = (
            logits(peft.PeftModel.from_pretrained(base_model(), tmp_path / name).eval())
            for name in ("m", "pairs")
        )
    assert np.array_equal(lossy, wanted)


class TestWherePeftIsNotTheOracle:
    """Each of these is a reason that this engine exists; one that fails is good news from PEFT."""

    def test_its_linear_is_no_weighted_sum(self, loaded: Any, folders: dict[str, Path]) -> None:
        loaded.add_weighted_adapter(["a", "b"], [0.5, 0.5], "m", combination_type="linear")
        both = [peft_deltas(loaded, name) for name in "ab"]
        merged = merge([read(folders[name]) for name in "ab"], weights=[0.5, 0.5], method="linear")
        for module, theirs in peft_deltas(loaded, "m").items():
            wanted = 0.5 * both[0][module] + 0.5 * both[1][module]
            assert oracle.relative(theirs, wanted) > 0.5
            assert oracle.relative(oracle.deltas(merged.adapter)[module], wanted) < 1e-6

    def test_the_same_adapter_twice_at_half_weight_is_doubled(self, loaded: Any) -> None:
        with Quiet():
            loaded.add_weighted_adapter(["a", "a"], [0.5, 0.5], "m", combination_type="linear")
        once, theirs = peft_deltas(loaded, "a"), peft_deltas(loaded, "m")
        assert all(oracle.relative(theirs[m], 2 * once[m]) < 1e-5 for m in once)

    def test_an_rslora_first_makes_the_result_too_strong(
        self, loaded: Any, folders: dict[str, Path]
    ) -> None:
        loaded.add_weighted_adapter(["rslora", "a"], [1.0, 1.0], "m", combination_type="cat")
        first, second = (peft_deltas(loaded, name) for name in ("rslora", "a"))
        ours = oracle.deltas(merge([read(folders[n]) for n in ("rslora", "a")]).adapter)
        for module, theirs in peft_deltas(loaded, "m").items():
            wanted = first[module] + second[module]
            assert oracle.relative(theirs, 8**0.5 * wanted) < 1e-5
            assert oracle.relative(ours[module], wanted) < 1e-6

    def test_unequal_ranks_are_refused_by_its_linear(self, folders: dict[str, Path]) -> None:
        with Quiet():
            model = peft.PeftModel.from_pretrained(base_model(), folders["a"], adapter_name="a")
            model.load_adapter(folders["small"], adapter_name="small")
        with pytest.raises(ValueError, match="same r value"):
            model.add_weighted_adapter(["a", "small"], [1, 1], "m", combination_type="linear")
        adapters = [read(folders[name]) for name in ("a", "small")]
        assert merge(adapters, method="linear").report.max_measured_error < 1e-7
