"""transformers and PEFT, which say what a Hugging Face base and an adapter answer."""

from __future__ import annotations

from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from adapterkit.errors import UncheckableError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from adapterkit.doctor.distributions import Distribution

    Ask = Callable[[str, float], Distribution]

_TOLD = 512


@contextmanager
def transformers_model(base: Path, adapter: Path, *, by_text: bool) -> Generator[Ask]:
    """Yield a function of a prompt and the adapter's strength.

    Args:
        base: directory of a model with weights and tokenizer.
        adapter: directory of PEFT.
        by_text: whether tokens are told by their text, not by their number.

    Raises:
        UncheckableError: if a library is not installed, or they do not take the files.
    """
    try:
        torch: Any = import_module("torch")
        transformers: Any = import_module("transformers")
        peft: Any = import_module("peft")
    except ImportError as error:
        message = f"{error.name} is not installed; pip install torch transformers peft"
        raise UncheckableError(message, path=base) from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, local_files_only=True)
        with _without_bars(transformers.utils.logging):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                base, dtype=torch.float32, local_files_only=True
            )
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UncheckableError(f"transformers does not take it: {reason}", path=base) from error
    layers = [
        module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    usual = [dict(layer.scaling) for layer in layers]

    def ask(prompt: str, strength: float) -> Distribution:
        for layer, scaling in zip(layers, usual, strict=True):
            layer.scaling = {name: value * strength for name, value in scaling.items()}
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(tokens).logits[0, -1].double()
        values, numbers = torch.log_softmax(logits, 0).topk(min(_TOLD, len(logits)))
        pairs = zip(numbers.tolist(), values.tolist(), strict=True)
        return {tokenizer.decode([n]) if by_text else n: value for n, value in pairs}

    yield ask


@contextmanager
def _without_bars(logging: Any) -> Generator[None]:
    """Have transformers draw no progress of its own on its user's terminal."""
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()
