"""Files that carry a proof, one of each format that holds it in its own way."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterkit import convert

FIXTURES = Path(__file__).parents[2] / "fixtures"
TINY, BASE = FIXTURES / "peft" / "tiny", FIXTURES / "peft" / "base"
WEIGHTS = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors", "gguf": ""}


@pytest.fixture(params=["peft", "mlx", "gguf"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"made-{request.param}"
    convert(TINY, path, to=request.param, base=BASE)
    return path


def weights(path: Path) -> Path:
    return path / WEIGHTS[path.name.removeprefix("made-")] if path.is_dir() else path
