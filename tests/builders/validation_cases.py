"""A small file for every code of `validate`, what it is held to, and what is found beside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from terminal import ROOT

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = ROOT / "fixtures" / "validation"
# What is a file; all others are directories.
FILES = ("*.gguf", "kohya.safetensors")


@dataclass(frozen=True)
class Case:
    """A file, what it is held to, and what cannot but be found beside the code."""

    source: str
    base: str | None = "llama"
    target: str | None = None
    beside: set[str] = field(default_factory=set[str])


def case(source: str, target: str | None = None, *beside: str, base: str | None = "llama") -> Case:
    return Case(source, base, target, set(beside))


TO_GGUF = "LCP001"  # every source that is no GGUF file has this note
CASES = {
    code: case(code)
    for code in (
        *(f"AK{number}" for number in range(101, 114)),
        *("AK115", "AK116", "AK117", "AK119", "AK123"),
        *("AK201", "AK202", "AK203", "AK204", "AK205"),
        *("AK301", "AK302", "AK303", "AK304", "AK306", "AK401"),
    )
} | {
    "AK114": case("AK114", None, "AK108"),
    "AK118": case("AK118"),
    "AK122": case("AK122"),
    "AK120": case("AK120", None, "AK300", base=None),
    "AK121": case("AK121", "diffusers", "AK300", "AK501", base=None),
    "DIF001": case("sound", "diffusers"),
    "DIF002": case("DIF002", "diffusers", "AK300", base=None),
    "DIF003": case("DIF003", "diffusers", "AK300", base=None),
    "CUI001": case("sound", "comfyui"),
    "CUI002": case("CUI002", "comfyui", "AK300", base=None),
    "CUI003": case("CUI003", "comfyui", "AK300", base=None),
    "AK300": case("AK300", base=None),
    "AK305": case("AK305", base="vague"),
    "AK307": case("AK307", base="named"),
    "AK308": case("AK308", base="padded"),
    "AK309": case("AK309", base="deep"),
    "AK312": case("AK312", base="whole"),
    "AK313": case("AK313", base="whole"),
    "AK314": case("AK314", base="whole"),
    "AK503": case("AK308", "peft", "AK308", base="padded"),
    "VLLM021": case("AK312", "vllm", "AK312", base="whole"),
    "AK310": case("AK310", base="mixtral"),
    "AK404": case("AK404", None, "AK401"),
    "AK501": case("short-path", "peft"),
    "AK502": case("AK303", "llama.cpp", "AK303", "LCP005", TO_GGUF),
    "LCP001": case("sound", "llama.cpp"),
    "LCP003": case("gguf-norm", "llama.cpp"),
    "LCP004": case("gguf-suffix"),
    "LCP005": case("AK303", "llama.cpp", "AK303", "AK502", TO_GGUF),
    "LCP006": case("resized", "llama.cpp", TO_GGUF),
    "LCP007": case("gguf-alpha"),
    "LCP008": case("dora", "llama.cpp", TO_GGUF),
    "LCP009": case("pissa", "llama.cpp", TO_GGUF),
    "LCP010": case("replicated", "llama.cpp", TO_GGUF),
    "LCP011": case("tower", "llama.cpp", "AK502", TO_GGUF),
    "LCP013": case("tied-embedding", "llama.cpp", TO_GGUF, base="tied"),
    "LCP015": case("inert", "llama.cpp", "AK501", TO_GGUF, base="deepseek"),
    "LCP016": case("gguf-f64"),
    "LCP018": case("tied-output", "llama.cpp", TO_GGUF, base="tied"),
    "OLL000": case("gguf", "ollama@0.34.1"),
    "OLL001": case("sound", "ollama@0.34.0"),
    "VLLM001": case("gguf", "vllm"),
    "VLLM002": case("rank-32", "vllm"),
    "VLLM003": case("dora", "vllm"),
    "VLLM004": case("biased", "vllm"),
    "VLLM005": case("saved", "vllm"),
    "VLLM006": case("pissa", "vllm"),
    "VLLM007": case("invoked", "vllm"),
    "VLLM012": case("experts", "vllm", base="mixtral"),
    "VLLM013": case("patterns", "vllm@0.32"),
    "VLLM014": case("tower", "vllm", "AK501"),
    "VLLM017": case("rank-513", "vllm", "VLLM002"),
    "VLLM019": case("sound", "vllm", base="stablelm"),
    "VLLM020": case("sound", "vllm", "AK305", base="diffllama"),
    "SGL013": case("stacked", "sglang", "AK305", base="diffllama"),
    "MLX011": case("sound", "mlx", "AK305", "MLX001", base="diffllama"),
    "SGL014": case("tokens", "sglang", "SGL015"),
    "SGL000": case("gguf", "sglang", "SGL015"),
    "SGL001": case("rslora", "sglang", "SGL015"),
    "SGL002": case("patterns", "sglang", "SGL015"),
    "SGL003": case("dora", "sglang", "SGL015"),
    "SGL006": case("regex", "sglang", "SGL015"),
    "SGL011": case("saved", "sglang", "SGL015"),
    "SGL012": case("pissa", "sglang", "SGL015"),
    "SGL015": case("sound", "sglang"),
    "SGL016": case("tower", "sglang", "AK503"),
    "MLX001": case("sound", "mlx"),
    "MLX009": case("saved", "mlx", "MLX001"),
    "MLX010": case("pissa", "mlx", "MLX001"),
    "PEFT001": case("gguf", "peft"),
    "LRX001": case("gguf", "lorax"),
    "PEFT002": case("AK110", "peft", "AK110"),
    "VLLM018": case("AK110", "vllm", "AK110"),
    "LRX002": case("AK110", "lorax", "AK110"),
    "LRX003": case("rank-144", "lorax"),
    "LRX004": case("patterns", "lorax"),
    "LRX005": case("dora", "lorax"),
    "LRX006": case("sound", "lorax", base="stablelm"),
    "EXL001": case("gguf", "exllamav3"),
    "EXL002": case("patterns", "exllamav3"),
    "EXL003": case("dora", "exllamav3"),
    "LRT001": case("sound", "litert-lm"),
    "MRS001": case("gguf", "mistralrs"),
    "MRS002": case("dora", "mistralrs"),
    "MRS003": case("pissa", "mistralrs"),
    "MRS004": case("rank-513", "mistralrs"),
    "ORT001": case("sound", "onnxruntime-genai", "ORT004"),
    "ORT002": case("dora", "onnxruntime-genai", "ORT001", "ORT004"),
    "ORT003": case("pissa", "onnxruntime-genai", "ORT001", "ORT004"),
    "ORT004": case("sound", "onnxruntime-genai", "ORT001"),
    "OVN001": case("gguf", "openvino", "OVN004"),
    "OVN002": case("patterns", "openvino", "OVN004"),
    "OVN003": case("dora", "openvino", "OVN004"),
    "OVN004": case("sound", "openvino"),
    "TRT001": case("gguf", "tensorrt-llm"),
    "TRT002": case("patterns", "tensorrt-llm"),
    "TRT003": case("saved", "tensorrt-llm"),
    "TRT004": case("rank-144", "tensorrt-llm"),
}


def source_of(name: str) -> Path:
    folder = FOLDER / name
    return next((file for pattern in FILES for file in folder.glob(pattern)), folder)
