"""What diffusers' loaders and converters make of a file, on tiny models."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from diffusers.loaders import lora_conversion_utils, lora_pipeline, single_file_utils
from peft.tuners.tuners_utils import BaseTunerLayer

if TYPE_CHECKING:
    from pathlib import Path

from diffusion_models import ENCODERS, FAMILIES, Arrays

# Sizes that diffusers has written into its converters, and those of the tiny models.
SIZES = {
    "_convert_kohya_flux_lora_to_diffusers": ("[3072, 3072, 3072, 12288]", "[16, 16, 16, 64]"),
    "_convert_non_diffusers_lumina2_lora_to_diffusers": ("[2304, 768, 768]", "[24, 8, 8]"),
    "_convert_hunyuan_video_lora_to_diffusers": ("hidden_size = 3072", "hidden_size = 16"),
    "_convert_bfl_flux_control_lora_to_diffusers": ("inner_dim = 3072", "inner_dim = 16"),
    "_convert_fal_kontext_lora_to_diffusers": ("inner_dim = 3072", "inner_dim = 16"),
}
_DEPTHS = (
    ("num_layers = 19", "num_layers = 2"),
    ("num_single_layers = 38", "num_single_layers = 2"),
)


@functools.cache
def small() -> None:
    """Make diffusers' converters fit the tiny models; widths alone are changed."""
    for name, sizes in SIZES.items():
        source = inspect.getsource(getattr(lora_conversion_utils, name))
        assert sizes[0] in source
        for old, new in (sizes, *_DEPTHS):
            source = source.replace(old, new)
        scope = dict(vars(lora_conversion_utils))
        exec(source, scope)  # noqa: S102
        for module in (lora_conversion_utils, lora_pipeline):
            setattr(module, name, scope[name])


@functools.cache
def _networks(name: str) -> Arrays:
    """Return what a loader of a family loads into, by component; to be copied before that."""
    family = FAMILIES[name]
    encoders = {component: build() for component, build in ENCODERS.get(name, {}).items()}
    return {family.component: family.model(), **encoders}


def loaded(name: str, path: Path) -> Arrays:
    """Return ΔW of every module that diffusers changes, in float64; of biases under their names."""
    small()
    family = FAMILIES[name]
    pipeline: Any = type("Pipeline", (getattr(lora_pipeline, family.mixin),), {})()
    pipeline.hf_device_map = None
    networks = {component: copy.deepcopy(each) for component, each in _networks(name).items()}
    pipeline.text_encoder = pipeline.text_encoder_2 = pipeline.transformer_2 = None
    pipeline.connectors = None
    for component, network in networks.items():
        setattr(pipeline, component, network)
    pipeline.components = networks
    pipeline.load_lora_weights(str(path), adapter_name="a")
    found: Arrays = {}
    for component, network in networks.items():
        found |= updates(network, component)
    return found


def updates(network: Any, component: str) -> Arrays:
    """Return what merging its LoRA layers changes in a model."""
    network.double()
    found: Arrays = {}
    with torch.no_grad():
        for module, layer in network.named_modules():
            if not isinstance(layer, BaseTunerLayer):
                continue
            base: Any = layer.get_base_layer()
            before = {name: x.clone() for name, x in base.named_parameters(recurse=False)}
            layer.merge()
            for name, tensor in base.named_parameters(recurse=False):
                change = (tensor - before[name]).numpy()
                if name == "weight":
                    found[f"{component}.{module}"] = change
                elif change.any():
                    found[f"{component}.{module}.{name}"] = change
            layer.unmerge()
    return found


class _Checkpoint(dict[str, torch.Tensor]):
    """A checkpoint of original names in which what nobody adapted is zero."""

    def pop(self, key: str, *default: Any) -> torch.Tensor:
        rows = 7 * 16 if ".linear1." in key else 6 * 16
        return super().pop(key, *default or (torch.zeros(rows, 1),))


def converted(name: str, updates: dict[str, torch.Tensor]) -> Arrays:
    """Return dense updates under original names as diffusers' checkpoint converter maps them."""
    function, *sizes = FAMILIES[name].converter
    source = inspect.getsource(getattr(single_file_utils, function))
    scope = dict(vars(single_file_utils))
    if sizes:
        assert sizes[0] in source
        source = source.replace(*sizes)
    exec(source, scope)  # noqa: S102
    found = scope[function](_Checkpoint({f"{key}.weight": x for key, x in updates.items()}))
    return {
        f"{FAMILIES[name].component}.{key.removesuffix('.weight')}": tensor.numpy()
        for key, tensor in found.items()
        if torch.is_tensor(tensor)
    }
