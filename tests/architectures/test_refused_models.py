"""Models that llama.cpp does not run are refused by name, with the reason."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

import adapterkit
from adapterkit.architectures import find, refusal
from adapterkit.base import open_base
from adapterkit.errors import UnknownArchitectureError

DATA = Path(adapterkit.__file__).parent / "architectures" / "refused.toml"
GROUPS = tomllib.loads(DATA.read_text(encoding="utf-8"))["refused"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["WhisperForConditionalGeneration"]}, "which whisper.cpp runs"),
        ({"model_type": "whisper"}, "which whisper.cpp runs"),
        ({"architectures": ["Unheard"], "model_type": "opt"}, "Unheard, opt: .* no graph"),
        ({"architectures": ["Unheard"]}, "Unheard is not in the tables"),
        ({}, "no architecture is not in the tables"),
    ],
)
def test_reason_is_given(config: dict[str, object], reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = open_base(tmp_path / "config.json")
    with pytest.raises(UnknownArchitectureError, match=reason):
        _ = base.family


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"architectures": ["LlamaModel"], "model_type": "llama"}, "llama"),
        ({"model_type": "llama"}, "llama"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "qwen3"),
        ({"architectures": ["Gemma3TextModel"], "model_type": "gemma3_text"}, "gemma-embedding"),
        ({"model_type": "gemma3_text"}, "gemma3"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "gemma-embedding"),
        ({"architectures": ["T5EncoderModel"], "model_type": "t5"}, "t5encoder"),
        ({"architectures": ["JinaBertForMaskedLM"], "model_type": "bert"}, "jina-bert-v2"),
        ({"architectures": ["BaichuanM1ForCausalLM"], "model_type": "llama"}, ""),
        (
            {
                "architectures": ["InternVLChatModel"],
                "llm_config": {"architectures": ["InternLM2ForCausalLM"]},
            },
            "internlm2",
        ),
    ],
)
def test_class_decides(config: dict[str, object], family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = open_base(tmp_path / "config.json")
    assert (base.architecture.name, base.architecture.known) == (family, bool(family))


def test_no_family_is_refused_and_no_name_twice() -> None:
    names = [name for group in GROUPS for name in group["names"]]
    assert len(names) == len(set(names))
    for name in names:
        assert refusal(name)
        assert not [a for a in find(name) if name in a.names]
    assert refusal("LlamaForCausalLM") is None
