"""PiSSA and OLoRA adapters, made plain with the base, are the model that PEFT loads."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import adapterkit
from adapterkit.base import open_base
from adapterkit.errors import UnsupportedError
from adapterkit.formats.peft.reader import read_peft
from adapterkit.formats.peft.writer import write_peft
from adapterkit.formats.protocol import Options
from adapterkit.passes.initialisation import undone
from adapterkit.passes.protocol import Context
from adapterkit.projection import project_file
from adapterkit.tinylora import TinySettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from adapterkit.model import AdapterTensorSet

transformers.utils.logging.disable_progress_bar()

PROMPT = torch.tensor([[3, 17, 44, 9, 60, 2]])
TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.0.mlp.up_proj": 5},
        "alpha_pattern": {"k_proj": 3},
    },
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 for a property by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    apart(model)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def apart(model: Any) -> None:
    """Give every matrix singular values that differ clearly: 1, 0.9, 0.81, ..."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
            u, s, vh = torch.linalg.svd(parameter.data.double(), full_matrices=False)
            steps = 0.9 ** torch.arange(len(s), dtype=torch.float64)
            parameter.data = (u @ torch.diag(steps) @ vh).float()


def tuned(base: Path, folder: Path, init: str, model_class: Any = None, **settings: Any) -> Path:
    """Save an adapter that has moved away from its initialisation a little."""
    torch.manual_seed(1)
    config = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 7,
            "init_lora_weights": init,
            "target_modules": TARGETS,
            "task_type": "CAUSAL_LM",
            **settings,
        }
    )
    model = get_peft_model((model_class or LlamaForCausalLM).from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    # Not the path, by which the base would be found.
    known = json.loads((folder / "adapter_config.json").read_text())
    known["base_model_name_or_path"] = "nobody/base"
    (folder / "adapter_config.json").write_text(json.dumps(known))
    return folder


def loaded(base: Path, adapter: Path, model_class: Any = LlamaForCausalLM) -> Any:
    return PeftModel.from_pretrained(model_class.from_pretrained(base), adapter).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(PROMPT).logits


def merged(base: Path, adapter: Path, model_class: Any = LlamaForCausalLM) -> dict[str, np.ndarray]:
    before = {
        n: x.detach().clone() for n, x in model_class.from_pretrained(base).named_parameters()
    }
    after = loaded(base, adapter, model_class).merge_and_unload().named_parameters()
    return {name: (x.detach().double() - before[name].double()).numpy() for name, x in after}


def dense(adapter: AdapterTensorSet) -> dict[str, np.ndarray]:
    return {
        pair.module: pair.scale * pair.b.numpy().astype(float) @ pair.a.numpy().astype(float)
        for pair in adapter.pairs()
    }


def relative(got: Any, want: Any) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_update_of_the_original_base_is_the_one_that_peft_merges(
    init: str, settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    path = tuned(base, tmp_path, init, **settings)
    truth, raw = merged(base, path), read_peft(path, Options())
    plain = undone(raw, Context(base=open_base(base))).adapter
    ranks = {pair.module: pair.rank for pair in raw.pairs()}
    naive, ours = dense(raw), dense(plain)
    assert len(ours) == 2 * len(TARGETS)
    for pair in plain.pairs():
        module = pair.module
        assert relative(ours[module], truth[f"{module}.weight"]) < 3e-6, module
        assert relative(naive[module], truth[f"{module}.weight"]) > 0.1, module
        assert pair.rank == 2 * ranks[module]
        assert pair.scale == raw.scales[module]
    assert plain.initialisation is None


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_what_is_written_gives_peft_the_same_logits(
    init: str, dora: bool, base: Path, tmp_path: Path
) -> None:
    path = tuned(base, tmp_path / "pissa", init, use_dora=dora)
    plain = undone(read_peft(path, Options()), Context(base=open_base(base))).adapter
    write_peft(plain, tmp_path / "plain", Options(base=open_base(base)))
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    want, got = logits(loaded(base, path)), logits(loaded(base, tmp_path / "plain"))
    effect = (want - logits(LlamaForCausalLM.from_pretrained(base))).norm()
    assert effect > 1e-1
    assert (got - want).norm() < 1e-5 * effect


def test_pissa_on_conv1d_follows_the_turned_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    apart(model)
    model.save_pretrained(tmp_path / "base")
    path = tuned(
        tmp_path / "base",
        tmp_path / "pissa",
        "pissa",
        GPT2LMHeadModel,
        target_modules=["c_attn", "c_fc", "c_proj"],
        fan_in_fan_out=True,
    )
    truth = merged(tmp_path / "base", path, GPT2LMHeadModel)
    ours = dense(
        undone(read_peft(path, Options()), Context(base=open_base(tmp_path / "base"))).adapter
    )
    assert len(ours) == 4
    for module, update in ours.items():
        assert relative(update, truth[f"{module}.weight"].T) < 3e-6, module


def test_olora_on_a_square_conv1d_follows_the_stored_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    path = tuned(
        tmp_path / "base",
        tmp_path / "olora",
        "olora",
        GPT2LMHeadModel,
        target_modules=["attn.c_proj"],
        fan_in_fan_out=True,
    )
    truth = merged(tmp_path / "base", path, GPT2LMHeadModel)
    ours = dense(
        undone(read_peft(path, Options()), Context(base=open_base(tmp_path / "base"))).adapter
    )
    ((module, update),) = ours.items()
    assert relative(update, truth[f"{module}.weight"].T) < 3e-6


def test_embeddings_keep_their_factors(base: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
        path = tuned(base, tmp_path, "pissa", target_modules=["embed_tokens", "q_proj"])
    raw = read_peft(path, Options())
    plain = undone(raw, Context(base=open_base(base))).adapter
    before = {pair.module: pair for pair in raw.pairs()}
    after = {pair.module: pair for pair in plain.pairs()}
    assert after["model.embed_tokens"] == before["model.embed_tokens"]
    assert after["model.layers.0.self_attn.q_proj"].rank == 8
    want = merged(base, path)["model.embed_tokens.weight"]
    np.testing.assert_allclose(dense(plain)["model.embed_tokens"].T, want, atol=1e-6)


def test_half_precision_factors_lose_nothing(base: Path, tmp_path: Path) -> None:
    path = tuned(base, tmp_path, "pissa")
    weights = path / "adapter_model.safetensors"
    halved = {name: x.to(torch.bfloat16) for name, x in load_file(weights).items()}
    save_file(halved, weights)
    raw = read_peft(path, Options())
    plain = undone(raw, Context(base=open_base(base))).adapter
    for old, new in zip(raw.pairs(), plain.pairs(), strict=True):
        np.testing.assert_array_equal(new.a.numpy()[:4], old.a.numpy().astype(np.float32))
        np.testing.assert_array_equal(new.b.numpy()[:, :4], old.b.numpy().astype(np.float32))


def test_rounding_in_training_is_noted_where_it_shows(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    path = tuned(base, tmp_path / "pissa", "pissa")
    clean = undone(read_peft(path, Options()), Context(base=open_base(base)))
    rounded = undone(read_peft(path, Options()), Context(base=open_base(tmp_path / "base")))
    assert not any("BF16" in str(note) for note in clean.notes)
    assert any("rounded to BF16" in str(note) for note in rounded.notes)


def crowded(base: Path, folder: Path, gap: float) -> Path:
    """Save a base whose fourth and fifth singular value of one weight differ by `gap`."""
    model = LlamaForCausalLM.from_pretrained(base)
    weight = model.model.layers[0].self_attn.q_proj.weight
    u, s, vh = torch.linalg.svd(weight.data.double())
    s[4] = s[3] * (1 - gap)
    weight.data = (u @ torch.diag(s) @ vh).float()
    model.save_pretrained(folder)
    return folder


def test_crowded_singular_values_are_noted_with_a_bound(base: Path, tmp_path: Path) -> None:
    near = crowded(base, tmp_path / "near", 3e-6)
    path = tuned(near, tmp_path / "pissa", "pissa", target_modules=["q_proj"])
    done = undone(read_peft(path, Options()), Context(base=open_base(near)))
    (note,) = [str(note) for note in done.notes if "may amount to" in str(note)]
    plain = done.adapter
    module, bound = note.split(":")[0], float(note.split("amount to ")[1].split(" ")[0])
    assert module == "model.layers.0.self_attn.q_proj"
    error = relative(dense(plain)[module], merged(near, path)[f"{module}.weight"])
    assert 1e-6 < error < bound < 1e-1


def test_singular_values_that_agree_are_refused(base: Path, tmp_path: Path) -> None:
    same = crowded(base, tmp_path / "same", 0)
    path = tuned(same, tmp_path / "pissa", "pissa", target_modules=["q_proj"])
    with pytest.raises(adapterkit.UnsupportedError, match="so close together") as caught:
        undone(read_peft(path, Options()), Context(base=open_base(same)))
    assert caught.value.where == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("pissa_niter_4", "randomised"),
        ("corda", "covariance"),
        ("lora_ga", "gradients"),
        ("loftq", "quantisation"),
        ("olora_v2", "does not know"),
    ],
)
def test_what_the_base_does_not_tell_is_refused_with_the_way_out(
    init: str, reason: str, base: Path, tmp_path: Path
) -> None:
    path = tuned(base, tmp_path, "gaussian")
    config = path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": init}))
    raw = read_peft(path, Options())
    if init == "olora_v2":
        raw = raw.replace(initialisation=init)
    with pytest.raises(adapterkit.UnsupportedError, match=reason) as caught:
        undone(raw, Context(base=open_base(base)))
    assert "path_initial_model_for_weight_conversion" in str(caught.value)


def test_adapters_that_left_the_base_alone_come_back_as_they_are(
    base: Path, tmp_path: Path
) -> None:
    raw = read_peft(tuned(base, tmp_path, "gaussian"), Options())
    assert undone(raw, Context(base=None)).adapter is raw


def test_base_must_be_there_with_its_weights(base: Path, tmp_path: Path) -> None:
    raw = read_peft(tuned(base, tmp_path, "pissa"), Options())
    with pytest.raises(adapterkit.BaseRequiredError, match="--base"):
        undone(raw, Context(base=None))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(adapterkit.BaseRequiredError, match="has no Hugging Face weights"):
        undone(raw, Context(base=open_base(tmp_path / "bare")))


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    raw = read_peft(tuned(base, tmp_path / "pissa", "pissa"), Options())
    with pytest.raises(adapterkit.IncompatibleBaseError, match="the base has"):
        undone(raw, Context(base=open_base(tmp_path / "other")))


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("target", ["x.gguf", "x"])
def test_convert_makes_it_plain_where_the_base_is_given(
    init: str, target: str, base: Path, tmp_path: Path
) -> None:
    source = tuned(base, tmp_path / "a", init)
    report = adapterkit.convert(source, tmp_path / target, base=base)
    assert report.max_relative_error < 1e-6
    written = adapterkit.read(tmp_path / target, base=base)
    assert not written.settings
    expected = merged(base, source)
    for module, update in dense(written).items():
        error = np.linalg.norm(update - expected[f"{module}.weight"])
        assert error < 3e-6 * np.linalg.norm(update)


def test_merging_takes_it_back_where_the_base_is_given(base: Path, tmp_path: Path) -> None:
    first, second = tuned(base, tmp_path / "a", "pissa"), tuned(base, tmp_path / "b", "olora", r=3)
    paths, target = [first, second], tmp_path / "out"
    with pytest.raises(UnsupportedError, match=r"changed the base.*--base"):
        adapterkit.merge_files(paths, target)
    report = adapterkit.merge_files(paths, target, base=base, weights=[0.7, -0.2])
    assert sum("taken back" in note for note in report.notes) == 2
    truths = merged(base, first), merged(base, second)
    found = dense(read_peft(target, Options()))
    assert len(found) == 2 * len(TARGETS)
    for module, update in found.items():
        name = f"{module}.weight"
        want = 0.7 * truths[0][name] - 0.2 * truths[1][name]
        assert relative(update, want) < 3e-6, module


def test_convert_without_the_weights_says_what_is_needed(base: Path, tmp_path: Path) -> None:
    source = tuned(base, tmp_path / "a", "pissa")
    config = tmp_path / "config.json"
    config.write_text((base / "config.json").read_text())
    with pytest.raises(adapterkit.LossyConversionError, match="--base DIRECTORY"):
        adapterkit.convert(source, tmp_path / "x.gguf", base=config)


def test_peft_keeps_it_as_it_is_without_a_base(base: Path, tmp_path: Path) -> None:
    source = tuned(base, tmp_path / "a", "pissa")
    adapterkit.convert(source, tmp_path / "b")
    torch.testing.assert_close(
        logits(loaded(base, tmp_path / "b")), logits(loaded(base, source)), rtol=0, atol=0
    )


@pytest.fixture
def pissa(base: Path, tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Return a PiSSA adapter, and the update that it is of the original base."""
    path = tuned(base, tmp_path / "pissa", "pissa")
    weights = {f"{module}.weight" for module in dense(read_peft(path, Options()))}
    return path, {
        n.removesuffix(".weight"): x for n, x in merged(base, path).items() if n in weights
    }


def same(got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float) -> bool:
    return got.keys() == want.keys() and all(relative(got[n], want[n]) < tolerance for n in want)


def test_compress_cuts_the_update_of_the_original_base(
    pissa: tuple[Path, dict[str, np.ndarray]], base: Path, tmp_path: Path
) -> None:
    path, update = pissa
    for name in ("small", "small.gguf"):
        adapterkit.compress_file(path, tmp_path / name, rank=8, base=base)
        assert same(dense(adapterkit.read(tmp_path / name, base=base)), update, 3e-6)
    with pytest.raises(adapterkit.BaseRequiredError, match="--base"):
        adapterkit.compress_file(path, tmp_path / "without", rank=2)
    with pytest.raises(adapterkit.BaseRequiredError, match="--base"):
        adapterkit.compress(adapterkit.read(path), rank=2)
    assert not (tmp_path / "without").exists()


def test_diff_holds_the_update_of_the_original_base_against_another(
    pissa: tuple[Path, dict[str, np.ndarray]], base: Path, tmp_path: Path
) -> None:
    path, _ = pissa
    adapterkit.convert(path, tmp_path / "plain", base=base)
    assert adapterkit.diff(path, tmp_path / "plain", base=base).equal
    assert adapterkit.diff(tmp_path / "plain", path, base=base).equal
    with pytest.raises(adapterkit.UncheckableError, match="--base"):
        adapterkit.diff(path, tmp_path / "plain")
    # What is the same bit for bit is the same on any base.
    shutil.copytree(path, tmp_path / "copy")
    assert adapterkit.diff(path, tmp_path / "copy").equal
    moved = load_file(path / "adapter_model.safetensors")
    save_file(
        {n: x * 1.0001 for n, x in moved.items()}, tmp_path / "copy/adapter_model.safetensors"
    )
    with pytest.raises(adapterkit.UncheckableError, match="--base"):
        adapterkit.diff(path, tmp_path / "copy", tolerance=0.1)


def test_projection_is_of_the_update_of_the_original_base(
    pissa: tuple[Path, dict[str, np.ndarray]], base: Path, tmp_path: Path
) -> None:
    path, update = pissa
    settings = TinySettings(projection_dim=4, frozen_rank=2, target_modules=tuple(TARGETS))
    made = project_file(path, tmp_path / "tiny", base=base, settings=settings)
    norms = {row.module: row.norm for row in made.report.modules}
    assert norms == {name: pytest.approx(np.linalg.norm(x), rel=1e-5) for name, x in update.items()}
    assert any("pissa" in note for note in made.notes)


def test_projection_keeps_no_tokens_and_says_so(base: Path, tmp_path: Path) -> None:
    path = tuned(base, tmp_path / "alora", "gaussian", alora_invocation_tokens=[3, 4])
    settings = TinySettings(projection_dim=4, target_modules=tuple(TARGETS))
    with pytest.raises(UnsupportedError, match="alora_invocation_tokens"):
        project_file(path, tmp_path / "tiny", base=base, settings=settings)
    assert not (tmp_path / "tiny").exists()


def test_audit_measures_the_update_of_the_original_base(
    pissa: tuple[Path, dict[str, np.ndarray]], base: Path
) -> None:
    path, update = pissa
    (audited,) = adapterkit.audit(path, base=base).adapters
    for row in audited.modules:
        assert row.frobenius_norm == pytest.approx(np.linalg.norm(update[row.module]), rel=1e-5)
    with pytest.raises(adapterkit.BaseRequiredError, match="--base"):
        adapterkit.audit(path)


def test_only_peft_carries_it_where_no_base_is_at_hand(
    pissa: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    path, _ = pissa
    for target in ("x.gguf", "x"):
        with pytest.raises(UnsupportedError, match="--base"):
            adapterkit.convert(path, tmp_path / target, to=None if "." in target else "mlx")
    with pytest.raises(adapterkit.BaseRequiredError, match="--base"):
        adapterkit.merge_files([path, path], tmp_path / "merged")


def test_a_base_that_is_found_makes_it_plain_for_peft_too(
    pissa: tuple[Path, dict[str, np.ndarray]],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, update = pissa
    snapshot = tmp_path / "hub" / "models--org--base" / "snapshots" / "1"
    shutil.copytree(base, snapshot)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    config = path / "adapter_config.json"
    named = {"base_model_name_or_path": "org/base"}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    adapterkit.convert(path, tmp_path / "plain")
    written = adapterkit.read(tmp_path / "plain")
    assert not written.settings
    assert same(dense(written), update, 3e-6)


def test_no_stack_takes_it(pissa: tuple[Path, dict[str, np.ndarray]], base: Path) -> None:
    with pytest.raises(adapterkit.AdapterIncompatibleError, match="convert --base"):
        adapterkit.AdapterStack(base).load(pissa[0])
