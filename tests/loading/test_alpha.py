"""`--alpha` fills what a file leaves open and overrides nothing, judged by PEFT's answers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conformance.making import quiet
from small_llama import small_llama
from terminal import invoke

import adapterkit
from adapterkit.errors import UnsupportedError, UsageError

ALPHA = 12
TOKENS = torch.tensor([[3, 17, 4, 9]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A base, PEFT's adapter, its weights alone, and the same as GGUF and MLX; the live answer."""
    root = tmp_path_factory.mktemp("alpha")
    with quiet(), torch.no_grad():
        base = small_llama(seed=7)
        base.save_pretrained(root / "base")
        lora = peft.LoraConfig(
            r=4, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        )
        tuned: Any = peft.get_peft_model(base, lora)
        tuned.save_pretrained(root / "peft")
        live = tuned(TOKENS).logits
    (root / "bare").mkdir()
    weights = (root / "peft" / "adapter_model.safetensors").read_bytes()
    (root / "bare" / "adapter_model.safetensors").write_bytes(weights)
    base_of = root / "base"
    adapterkit.convert(root / "peft", root / "it.gguf", base=base_of)
    adapterkit.convert(root / "peft", root / "mlx", to="mlx", base=base_of)
    return root, live


def answered(root: Path, adapter: Path) -> torch.Tensor:
    load: Any = peft.PeftModel.from_pretrained
    with quiet(), torch.no_grad():
        base: Any = transformers.LlamaForCausalLM.from_pretrained(root / "base").eval()
        return load(base, adapter)(TOKENS).logits


@pytest.mark.parametrize("name", ["peft", "it.gguf", "mlx"])
def test_another_alpha_than_the_file_holds_is_refused(
    name: str, made: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    root, live = made
    for command in (["inspect"], ["convert", "-o", str(tmp_path / "no"), "--to", "peft"]):
        ran = invoke(command[0], str(root / name), *command[1:], "--alpha", "99")
        assert ran.exit_code == 2, ran.output
        assert all(part in ran.output for part in (str(root / name), "alpha is 12", "is 99"))
    assert not (tmp_path / "no").exists()
    base = root / "base"
    adapterkit.convert(root / name, tmp_path / "out", to="peft", base=base, alpha=ALPHA)
    torch.testing.assert_close(answered(root, tmp_path / "out"), live, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["peft", "it.gguf", "mlx"])
def test_of_several_it_is_for_those_that_leave_it_open(
    name: str, made: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    root, _ = made
    base = root / "base"
    bare, other = root / "bare", root / name
    # Twice what the file is: that of the file stays what it is.
    twice = adapterkit.diff(bare, other, base=base, alpha=2 * ALPHA)
    assert not twice.equal
    assert adapterkit.diff(bare, other, base=base, alpha=ALPHA).equal
    adapterkit.merge_files(
        [bare, other], tmp_path / "sum", weights=[0.5, 1], base=base, alpha=2 * ALPHA
    )
    adapterkit.merge_files([root / "peft"], tmp_path / "twice", weights=[2], base=base)
    wanted = answered(root, tmp_path / "twice")
    torch.testing.assert_close(answered(root, tmp_path / "sum"), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "command",
    [
        ["inspect"],
        ["validate"],
        ["convert", "--to", "peft", "-o", "OUT"],
        ["audit"],
        ["audit", "--bank", "OUT"],
        ["stack", "--for", "vllm"],
    ],
    ids=lambda command: "-".join(command[:2]),
)
@pytest.mark.parametrize("name", ["peft", "it.gguf"])
def test_no_command_judges_one_of_several_alone(
    name: str, command: list[str], made: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    root, _ = made
    settings = [str(tmp_path / "out") if word == "OUT" else word for word in command[1:]]
    settings += ["--base", str(root / "base"), "--alpha", str(2 * ALPHA)]
    if command[0] == "stack":
        name = "peft"  # an engine takes no stack of two formats
    one, two = str(root / "bare"), str(root / name)
    for sources in ([one, two], [two, one]):
        ran = invoke(command[0], *sources, *settings, "--json" if command[0] == "inspect" else "-q")
        assert "in the file, --alpha is" not in ran.output
        if (tmp_path / "out").is_file():
            (tmp_path / "out").unlink()
        settings += ["--force"] if command[0] == "convert" and "--force" not in settings else []
        if command[0] == "inspect":
            found = {each["source"]: each["scales"] for each in json.loads(ran.stdout)["results"]}
            assert found == {one: {"6.0": 4}, two: {"3.0": 4}}
    # Where no file leaves it open, each that states another refuses it.
    ran = invoke(command[0], two, str(root / "mlx"), *settings)
    assert "in the file, --alpha is" in ran.output


@pytest.mark.parametrize("name", ["it.gguf", "mlx"])
def test_verify_holds_a_file_against_what_it_was_given(
    name: str, made: tuple[Path, torch.Tensor]
) -> None:
    root, _ = made
    base, bare, other = root / "base", root / "bare", root / name
    report = adapterkit.verify(other, against=bare, base=base, alpha=99)
    assert not report.sound
    assert adapterkit.verify(other, against=bare, base=base, alpha=ALPHA).sound


@pytest.mark.parametrize("alpha", [0.0, -4.0, float("nan"), float("inf")])
def test_an_alpha_that_is_none_is_a_usage_error(
    alpha: float, made: tuple[Path, torch.Tensor]
) -> None:
    with pytest.raises(UsageError, match="--alpha is"):
        adapterkit.inspect(made[0] / "bare", alpha=alpha)
    ran = invoke("inspect", str(made[0] / "bare"), f"--alpha={alpha}")
    assert ran.exit_code == 2


def test_advice_has_the_alpha_that_the_file_needs(
    made: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    root, live = made
    report = adapterkit.validate(root / "bare", targets=["vllm"], alpha=ALPHA)
    hints = [each.hint for each in report.findings if each.code == "VLLM001"]
    assert hints == ["adapterkit convert SRC --alpha 12 -o DIR --for vllm"]
    stack = adapterkit.AdapterStack(root / "base")
    stack.load(root / "bare", alpha=ALPHA)
    with pytest.raises(UnsupportedError, match="convert SRC --alpha 12 -o DIR"):
        adapterkit.serving_settings(stack, "vllm")
    words = shlex.split(hints[0])[1:]
    places = {"SRC": str(root / "bare"), "DIR": str(tmp_path / "dir")}
    ran = invoke(*(places.get(word, word) for word in words), "--base", str(root / "base"))
    assert ran.exit_code == 0, ran.output
    torch.testing.assert_close(answered(root, tmp_path / "dir"), live, rtol=0, atol=1e-5)
