"""Names of tensors taken apart: what stands before the module, the module, what the tensor does."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Ends of names -> part of an update. The longest that fits is meant.
_PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A", ".lora_B"),
)
_PRODUCTS = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
_LEAVES = {
    **{down: "down" for down, _ in _PAIRS},
    **{up: "up" for _, up in _PAIRS},
    ".alpha": "alpha",
    ".lora_mid.weight": "mid",
    ".dora_scale": "dora",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".magnitude": "magnitude",
    ".diff": "diff",
    ".diff_b": "bias",
    ".lora_B.bias": "scaled_bias",
    **{f".{name}": name for name in _PRODUCTS},
}
# Ends that are known, and of which no factors can be made -> what they are of.
_OFT, _IA3 = "OFT", "(IA)³"
FOREIGN = {
    ".w_norm": "an update of a norm",
    ".b_norm": "an update of a norm",
    ".oft_blocks": _OFT,
    ".oft_diag": _OFT,
    ".oft_R.weight": _OFT,
    ".rescale": _OFT,
    ".on_input": _IA3,
    ".a1.weight": "GLoRA",
    ".a2.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".b2.weight": "GLoRA",
    ".bm.weight": "GLoRA",
    ".lambda_layer": "T-LoRA",
    ".reshape_weight": "a weight of another size",
    ".set_weight": "a weight stored whole",
    ".lora_A.bias": "a bias on A",
    ".scalar": "LyCORIS before it was saved",
}
_ENDS = sorted((*_LEAVES, *FOREIGN), key=len, reverse=True)
# Before 2024 diffusers kept the layers of an attention in its processor.
_PROCESSOR = re.compile(
    r"^(?P<path>.+?)(?:\.processor)?\.(?P<layer>to_[qkv]|to_out|add_[qkv]_proj)_lora"
    r"\.(?P<side>down|up)\.weight$"
)
_PROCESSED = ".processor"
# XLabs and USO name the pairs of Flux by stream; a table knows which module each is.
_STREAM = re.compile(r"^(?P<path>.+\.(?:qkv|proj)_lora[12]?)\.(?P<side>down|up)\.weight$")
_WRAPPER = re.compile(
    r"^(?P<component>(?:transformer|unet|text_encoder(?:_[23])?)\.)?"
    r"base_model\.model\."
)

DENOISER, _PRIOR = "denoiser", "prior"
# Beginnings of names -> component and spelling, the longest first.
_PREFIXES = (
    ("lora_prior_unet_", _PRIOR, "kohya"),
    ("lora_prior_te_", _PRIOR, "kohya"),
    ("lora_unet__", DENOISER, "kohya"),
    ("lora_unet_", DENOISER, "kohya"),
    ("oft_unet_", DENOISER, "kohya"),
    ("lora_transformer_", DENOISER, "kohya"),
    ("lycoris_", DENOISER, "kohya"),
    ("lora_te1_", "te1", "kohya"),
    ("lora_te2_", "te2", "kohya"),
    ("lora_te3_", "te3", "kohya"),
    ("lora_te_", "te", "kohya"),
    ("model.diffusion_model.", DENOISER, "comfyui"),
    ("diffusion_model.", DENOISER, "comfyui"),
    ("transformer.", "transformer", "diffusers"),
    ("unet.", "unet", "diffusers"),
    ("text_encoder_2.", "text_encoder_2", "diffusers"),
    ("text_encoder_3.", "text_encoder_3", "diffusers"),
    ("text_encoder.", "text_encoder", "diffusers"),
)
_ENCODER = re.compile(r"^text_encoders\.(?P<name>\w+)\.transformer\.")


@dataclass(frozen=True, slots=True)
class Key:
    """The name of a tensor, taken apart.

    Attributes:
        name: all of it.
        stem: what the tensors of one module have in common.
        component: DENOISER, or the network as its spelling names it; empty if nothing says.
        spelling: format whose prefix it has; empty without one.
        path: the module, dotted, or underscored in kohya's spelling.
        part: what the tensor does: down, up, mid, alpha, dora, magnitude, diff, bias, scaled_bias
            or the name of a LyCORIS factor; a foreign end as it is; empty if none is known.
        end: what follows the module.
    """

    name: str
    stem: str
    component: str
    spelling: str
    path: str
    part: str
    end: str = ""

    @property
    def prefix(self) -> str:
        """What stands before the module."""
        return self.stem.removesuffix(self.path)

    @property
    def underscored(self) -> bool:
        """Whether dots were written as underscores."""
        return self.spelling == "kohya"

    @property
    def known(self) -> bool:
        """Whether the tensor is part of an update that is understood."""
        return self.part in _PARTS

    @property
    def foreign(self) -> str:
        """What it is a part of where that is no low-rank update: its name, or empty."""
        return FOREIGN.get(self.part, "")


_PARTS = frozenset(_LEAVES.values())


def parse(name: str) -> Key:
    """Return the parts of a name; a name that is none of a diffusion LoRA has no part."""
    stem, part = _ended(name)
    end = _PROCESSED if _PROCESSOR.match(name) else name.removeprefix(stem)
    plain = _WRAPPER.sub(lambda match: match["component"] or "", stem)
    for prefix, component, spelling in _PREFIXES:
        if plain.startswith(prefix):
            return Key(name, stem, component, spelling, plain[len(prefix) :], part, end)
    if match := _ENCODER.match(plain):
        return Key(name, stem, match["name"], "comfyui", plain[match.end() :], part, end)
    return Key(name, stem, "", "", plain, part, end)


def _ended(name: str) -> tuple[str, str]:
    if match := _PROCESSOR.match(name):
        layer = "to_out.0" if match["layer"] == "to_out" else match["layer"]
        return f"{match['path']}.{layer}", match["side"]
    if match := _STREAM.match(name):
        return match["path"], match["side"]
    for end in _ENDS:
        if name.endswith(end):
            return name.removesuffix(end), _LEAVES.get(end, end)
    return name, ""
