"""Tiny random models of every kind that diffusers builds."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

Arrays = dict[str, Any]
BLOCKS = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
FEW = {"in_channels": 4, "out_channels": 4}
UNET = FEW | {"sample_size": 8, "norm_num_groups": 4}
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
SINGLE = BLOCKS | {"num_single_layers": 2, "joint_attention_dim": 12, "patch_size": 1}


@dataclass(frozen=True)
class Family:
    """A model: the class that loads LoRA files for it, its own class, its configuration.

    Attributes:
        converter: function that converts an original checkpoint, with the numbers that stand in
            it and those of the tiny model.
    """

    mixin: str
    cls: str
    config: dict[str, Any]
    converter: tuple[str, ...] = ()

    @property
    def component(self) -> str:
        return "unet" if self.cls.startswith("UNet") else "transformer"

    def model(self) -> Any:
        torch.manual_seed(3)
        return getattr(diffusers, self.cls)(**self.config)


FAMILIES = {
    "sd": Family(
        "StableDiffusionLoraLoaderMixin",
        "UNet2DConditionModel",
        UNET
        | {
            "block_out_channels": (8, 16, 16, 16),
            "down_block_types": [x.format("Down") for x in (CROSS, CROSS, CROSS, PLAIN)],
            "up_block_types": [x.format("Up") for x in (PLAIN, CROSS, CROSS, CROSS)],
            "attention_head_dim": 2,
            "cross_attention_dim": 16,
        },
    ),
    "sdxl": Family(
        "StableDiffusionXLLoraLoaderMixin",
        "UNet2DConditionModel",
        UNET
        | {
            "block_out_channels": (8, 16, 16),
            "down_block_types": [x.format("Down") for x in (PLAIN, CROSS, CROSS)],
            "up_block_types": [x.format("Up") for x in (CROSS, CROSS, PLAIN)],
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (1, 2, 2),
            "cross_attention_dim": 32,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 40,
        },
    ),
    "flux": Family(
        "FluxLoraLoaderMixin",
        "FluxTransformer2DModel",
        SINGLE
        | {
            "in_channels": 4,
            "pooled_projection_dim": 10,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        },
        ("convert_flux_transformer_checkpoint_to_diffusers", "inner_dim = 3072", "inner_dim = 16"),
    ),
    "chroma": Family(
        "FluxLoraLoaderMixin",
        "ChromaTransformer2DModel",
        SINGLE
        | {
            "in_channels": 4,
            "axes_dims_rope": (2, 2, 4),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 8,
            "approximator_layers": 1,
        },
        (
            "convert_chroma_transformer_checkpoint_to_diffusers",
            "inner_dim = 3072",
            "inner_dim = 16",
        ),
    ),
    "flux2": Family(
        "Flux2LoraLoaderMixin",
        "Flux2Transformer2DModel",
        SINGLE
        | {
            "in_channels": 4,
            "timestep_guidance_channels": 8,
            "mlp_ratio": 3.0,
            "axes_dims_rope": (2, 2, 2, 2),
        },
        ("convert_flux2_transformer_checkpoint_to_diffusers",),
    ),
    "sd3": Family(
        "SD3LoraLoaderMixin",
        "SD3Transformer2DModel",
        BLOCKS
        | FEW
        | {
            "sample_size": 8,
            "patch_size": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        },
        ("convert_sd3_transformer_checkpoint_to_diffusers",),
    ),
    "wan": Family(
        "WanLoraLoaderMixin",
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 8,
            "out_channels": 4,
            "text_dim": 10,
            "freq_dim": 8,
            "ffn_dim": 40,
            "num_layers": 2,
            "image_dim": 14,
            "added_kv_proj_dim": 24,
        },
        ("convert_wan_transformer_to_diffusers",),
    ),
    "qwen": Family(
        "QwenImageLoraLoaderMixin",
        "QwenImageTransformer2DModel",
        BLOCKS
        | {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "joint_attention_dim": 12,
            "axes_dims_rope": (2, 2, 4),
        },
    ),
    "z_image": Family(
        "ZImageLoraLoaderMixin",
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 4,
            "dim": 24,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 3,
            "n_kv_heads": 3,
            "cap_feat_dim": 10,
            "axes_dims": [2, 2, 4],
            "axes_lens": [16, 16, 16],
        },
        ("convert_z_image_transformer_checkpoint_to_diffusers",),
    ),
    "lumina2": Family(
        "Lumina2LoraLoaderMixin",
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "ffn_dim_multiplier": 1.0,
            "cap_feat_dim": 10,
            "axes_dim_rope": (2, 2, 4),
            "axes_lens": (16, 16, 16),
        },
        (
            "convert_lumina2_to_diffusers",
            "q_dim = 2304\n        k_dim = v_dim = 768",
            "q_dim = 24\n        k_dim = v_dim = 8",
        ),
    ),
    "hunyuan_video": Family(
        "HunyuanVideoLoraLoaderMixin",
        "HunyuanVideoTransformer3DModel",
        BLOCKS
        | FEW
        | {
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": 12,
            "pooled_projection_dim": 10,
            "rope_axes_dim": (2, 2, 4),
        },
        ("convert_hunyuan_video_transformer_to_diffusers", "size = 3072", "size = 16"),
    ),
    "ltx": Family(
        "LTXVideoLoraLoaderMixin",
        "LTXVideoTransformer3DModel",
        BLOCKS | FEW | {"cross_attention_dim": 16, "caption_channels": 12},
        ("convert_ltx_transformer_checkpoint_to_diffusers",),
    ),
    "ltx2": Family(
        "LTX2LoraLoaderMixin",
        "LTX2VideoTransformer3DModel",
        BLOCKS
        | FEW
        | {
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "gated_attn": True,
            "audio_gated_attn": True,
        },
        ("convert_ltx2_transformer_to_diffusers",),
    ),
    "cogvideox": Family(
        "CogVideoXLoraLoaderMixin",
        "CogVideoXTransformer3DModel",
        BLOCKS
        | FEW
        | {
            "time_embed_dim": 4,
            "text_embed_dim": 12,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 8,
        },
    ),
    "auraflow": Family(
        "AuraFlowLoraLoaderMixin",
        "AuraFlowTransformer2DModel",
        FEW
        | {
            "sample_size": 8,
            "patch_size": 2,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 16,
        },
        ("convert_auraflow_transformer_checkpoint_to_diffusers",),
    ),
    "sana": Family(
        "SanaLoraLoaderMixin",
        "SanaTransformer2DModel",
        BLOCKS
        | FEW
        | {
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "sample_size": 8,
        },
        ("convert_sana_transformer_to_diffusers",),
    ),
    "hidream": Family(
        "HiDreamImageLoraLoaderMixin",
        "HiDreamImageTransformer2DModel",
        FEW
        | {
            "patch_size": 2,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": [12, 10],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1],
        },
        ("convert_hidream_transformer_to_diffusers",),
    ),
    # Without a loader of its own: PixArtTransformer2DModel takes no LoRA file.
    "pixart": Family(
        "",
        "PixArtTransformer2DModel",
        BLOCKS
        | {
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": 16,
            "sample_size": 8,
            "patch_size": 2,
            "caption_channels": 12,
            "norm_type": "ada_norm_single",
            "norm_num_groups": 1,
        },
    ),
}


def clip(cls: Any = CLIPTextModel) -> Any:
    torch.manual_seed(7)
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        max_position_embeddings=8,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return cls(config)


def t5() -> Any:
    torch.manual_seed(7)
    config = T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


_PROJECTED = functools.partial(clip, CLIPTextModelWithProjection)
# Text encoders of the pipelines whose loader takes LoRA files of any.
ENCODERS = {
    "sd": {"text_encoder": clip},
    "sdxl": {"text_encoder": clip, "text_encoder_2": _PROJECTED},
    "sd3": {"text_encoder": _PROJECTED, "text_encoder_2": _PROJECTED, "text_encoder_3": t5},
    "flux": {"text_encoder": clip, "text_encoder_2": t5},
}
