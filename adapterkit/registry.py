"""The formats, as data; telling them apart by content; read and write by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import strangers
from adapterkit.beside import trained_names
from adapterkit.destination import Directory
from adapterkit.errors import (
    FormatError,
    NotFoundError,
    UnknownFormatError,
)
from adapterkit.json_file import read_json_object
from adapterkit.notes import Provenance
from adapterkit.plugins import named, plugged_in
from adapterkit.stamps import BESIDE
from adapterkit.storage import alike, readable
from adapterkit.unrecognised import unrecognised

if TYPE_CHECKING:
    from adapterkit.formats.protocol import FormatOptions, Lister, Reader, Writer  # noqa: TC004  (slow to import)
    from adapterkit.model import AdapterTensorSet
    from adapterkit.notes import Loss

_GROUP = "adapterkit.formats"
_CONFIG, _INDEX = "adapter_config.json", "*.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatSpec:
    """One format, described without importing it.

    Attributes:
        name: as `--to` takes it.
        title: as people call it.
        reader: the `Reader`, itself or as `module:name`, which is imported on first use; empty
            where it cannot be read.
        lister: the `Lister` of what it cannot hold; empty where it cannot be written.
        writer: the `Writer`; empty where it cannot be written.
        cannot_hold: what is lost in it, for the table that `adapterkit list formats` prints.
        magic: bytes that its files begin with, if they are distinctive.
        magic_at: where they stand, within the first sixteen bytes.
        config_keys: keys of adapter_config.json of which one marks a directory as this format.
        config_match: fields of adapter_config.json and the values that mean this format, none
            given for any value; the first such match is preferred to any format's `config_keys`.
        probe: `module:function` that looks into a path that neither magic nor config keys told;
            takes the path, returns whether it is this format, and raises nothing for strangers.
        own_files: whether the probe tells it by files that no other format has, so that a config
            beside them says nothing else.
        suffixes: file suffixes that mean this format as a destination.
        files: names or patterns of the files of a format that is a directory; empty for a file.
        takes_dialect: whether its reader understands `--dialect`.
        any_vocabulary: whether tables of more rows than the base has, and frozen copies of tables
            that are not its own, may stand in it: what loads it can make the base grow, and takes
            the copies.
    """

    name: str
    title: str
    reader: Reader | str = ""
    lister: Lister | str = ""
    writer: Writer | str = ""
    cannot_hold: str = ""
    magic: bytes = b""
    magic_at: int = 0
    config_keys: tuple[str, ...] = ()
    config_match: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    probe: str = ""
    own_files: bool = False
    suffixes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    takes_dialect: bool = False
    any_vocabulary: bool = False

    @property
    def directory(self) -> Directory | None:
        """The kind of directory that it is written as: any adapter's, or None for a file."""
        if not self.files:
            return None
        return Directory("adapter directory", marks=_adapter_files, files=_replaced_files)

    def marked(self, names: Iterable[str]) -> bool:
        """Tell whether one of the names is that of a file of this format's directories alone."""
        own = [pattern for pattern in self.files if pattern != _CONFIG]
        return any(fnmatch(name, pattern) for name in names for pattern in own)

    @property
    def reads(self) -> bool:
        """Whether it can be read."""
        return bool(self.reader)

    @property
    def writes(self) -> bool:
        """Whether it can be written."""
        return bool(self.writer)

    def read(self, path: Path, options: FormatOptions) -> AdapterTensorSet:
        """Read an adapter; what may be raised is the reader's."""
        found: AdapterTensorSet = _function(self.reader)(path, options)
        if found.provenance is not None:
            return found
        return found.replace(provenance=Provenance(path, self.name))

    def losses(self, adapter: AdapterTensorSet, options: FormatOptions) -> Sequence[Loss]:
        """List everything of the adapter that this format cannot hold."""
        return _function(self.lister)(adapter, options)

    def write(self, adapter: AdapterTensorSet, path: Path, options: FormatOptions) -> None:
        """Write an adapter to a path where nothing is."""
        _function(self.writer)(adapter, path, options)


def _function(reference: Callable[..., Any] | str) -> Callable[..., Any]:
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    return attrgetter(name)(import_module(module))


BUILTIN = (
    FormatSpec(
        name="peft",
        title="PEFT LoRA directory",
        reader="adapterkit.formats.peft.reader:read_peft",
        lister="adapterkit.formats.peft.writer:losses",
        writer="adapterkit.formats.peft.writer:write_peft",
        cannot_hold="DoRA on some modules only, biases beside it",
        config_keys=("peft_type", "lora_alpha", "target_modules"),
        config_match={"peft_type": ("LORA",)},
        files=(
            "adapter_config.json",
            "adapter_model.safetensors",
            "adapter_model.bin",
            "adapter_model.safetensors.index.json",
            "adapter_model-*-of-*.safetensors",
        ),
        any_vocabulary=True,
    ),
    FormatSpec(
        name="gguf",
        title="GGUF LoRA adapter (llama.cpp, Ollama)",
        reader="adapterkit.formats.gguf.reader:read_adapter",
        lister="adapterkit.formats.gguf.losses:losses",
        writer="adapterkit.formats.gguf.writer:write_adapter",
        cannot_hold="DoRA, convolutions, biases, saved modules, token rows, embeddings and output "
        "of tied bases",
        magic=b"GGUF",
        suffixes=(".gguf",),
    ),
    FormatSpec(
        name="tinylora",
        title="TinyLoRA, self-contained safetensors",
        reader="adapterkit.formats.tinylora.self_contained:read",
        lister="adapterkit.formats.tinylora.self_contained:losses",
        writer="adapterkit.formats.tinylora.self_contained:write",
        cannot_hold="any update that is no TinyLoRA, and tensors beside it",
        probe="adapterkit.formats.tinylora.self_contained:is_self_contained",
    ),
    FormatSpec(
        name="tinylora-pack",
        title="TinyLoRA checkpoint of the ANRGUSC pack (needs the base's weights)",
        reader="adapterkit.formats.tinylora.pack:read",
        lister="adapterkit.formats.tinylora.pack_writer:losses",
        writer="adapterkit.formats.tinylora.pack_writer:write_pack",
        cannot_hold="anything but coefficients of its own projections; see `tinylora project`",
        probe="adapterkit.formats.tinylora.pack:is_pack",
        files=("adapter_state.pt", "tinylora.json", "manifest.json", "COMPLETED"),
        takes_dialect=True,
    ),
    FormatSpec(
        name="tinylora-peft",
        title="PEFT TinyLoRA directory",
        reader="adapterkit.formats.peft.tinylora_reader:read_peft_tinylora",
        lister="adapterkit.formats.peft.tinylora:losses",
        writer="adapterkit.formats.peft.tinylora:write",
        cannot_hold="any update that is no TinyLoRA; token rows",
        config_match={"peft_type": ("TINYLORA",)},
        files=("adapter_config.json", "adapter_model.safetensors"),
    ),
    FormatSpec(
        name="mlx",
        title="MLX-LM adapter directory",
        reader="adapterkit.formats.mlx.reader:read_mlx",
        lister="adapterkit.formats.mlx.losses:losses",
        writer="adapterkit.formats.mlx.writer:write_mlx",
        cannot_hold="DoRA on some modules only, convolutions, biases, saved modules, token rows",
        config_keys=("fine_tune_type", "lora_parameters"),
        probe="adapterkit.formats.mlx.probe:is_mlx",
        files=("adapter_config.json", "adapters.safetensors", "adapters.npz"),
    ),
    FormatSpec(
        name="onnx-adapter",
        title="onnxruntime adapter (.onnx_adapter of Olive, onnxruntime-genai)",
        reader="adapterkit.formats.onnx.reader:read_onnx",
        lister="adapterkit.formats.onnx.losses:losses",
        writer="adapterkit.formats.onnx.writer:write_onnx",
        cannot_hold="DoRA, embeddings, fused experts, convolutions, biases, saved modules, token "
        "rows, the base's name",
        magic=b"TORT",
        magic_at=4,
        suffixes=(".onnx_adapter",),
    ),
    FormatSpec(
        name="kohya",
        title="Diffusion LoRA, kohya's names (sd-scripts, A1111)",
        reader="adapterkit.formats.diffusion.format:KOHYA.read",
        lister="adapterkit.formats.diffusion.format:KOHYA.losses",
        writer="adapterkit.formats.diffusion.format:KOHYA.write",
        cannot_hold="biases, saved modules, token rows, modules that no diffusion model has",
        probe="adapterkit.formats.diffusion.format:is_kohya",
    ),
    FormatSpec(
        name="diffusers",
        title="Diffusion LoRA, diffusers' names",
        reader="adapterkit.formats.diffusion.format:DIFFUSERS.read",
        lister="adapterkit.formats.diffusion.format:DIFFUSERS.losses",
        writer="adapterkit.formats.diffusion.format:DIFFUSERS.write",
        cannot_hold="saved modules, token rows, modules that no diffusion model has",
        probe="adapterkit.formats.diffusion.format:is_diffusers",
    ),
    FormatSpec(
        name="comfyui",
        title="Diffusion LoRA, ComfyUI's native names",
        reader="adapterkit.formats.diffusion.format:COMFYUI.read",
        lister="adapterkit.formats.diffusion.format:COMFYUI.losses",
        writer="adapterkit.formats.diffusion.format:COMFYUI.write",
        cannot_hold="saved modules, token rows, modules that no diffusion model has",
        probe="adapterkit.formats.diffusion.format:is_comfyui",
    ),
    FormatSpec(
        name="lycoris",
        title="LyCORIS LoHa and LoKr",
        reader="adapterkit.formats.lycoris.reader:read_lycoris",
        probe="adapterkit.formats.lycoris.reader:is_lycoris",
    ),
    FormatSpec(
        name="dcp",
        title="PEFT LoRA in a sharded checkpoint of torch (DCP, FSDP)",
        reader="adapterkit.formats.peft.sharded:read_dcp_adapter",
        probe="adapterkit.formats.peft.sharded_files:is_dcp",
        own_files=True,
    ),
    FormatSpec(
        name="deepspeed",
        title="PEFT LoRA in a checkpoint of DeepSpeed (ZeRO)",
        reader="adapterkit.formats.peft.sharded:read_deepspeed_adapter",
        probe="adapterkit.formats.peft.sharded_files:is_zero",
        own_files=True,
    ),
    # After every format of one peft_type: this one answers for all others, reading or refusing.
    FormatSpec(
        name="peft-tuners",
        title="PEFT AdaLoRA, LoHa, LoKr, GraLoRA, HRA, IA3, LN tuning and others",
        reader="adapterkit.formats.peft.tuners:read_tuner",
        config_match={"peft_type": ()},
        files=("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    ),
    FormatSpec(
        name="peft-weights",
        title="PEFT LoRA weights without adapter_config.json",
        reader="adapterkit.formats.peft.bare:read_weights",
        probe="adapterkit.formats.peft.bare_files:is_weights",
    ),
    # Last: it claims whatever numpy or torch wrote and nobody else knows, to say what is wrong.
    FormatSpec(
        name="handwritten",
        title="Hand-written LoRA in .pt, .npz or .safetensors, by dialect",
        reader="adapterkit.formats.handwritten.format:read",
        probe="adapterkit.formats.handwritten.format:probe",
    ),
)


def _adapter_files() -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for known in formats() for name in known.files))


def _replaced_files() -> tuple[str, ...]:
    # What was trained with the adapter that was here before is not the new one's.
    return (*_adapter_files(), *trained_names(), BESIDE)


def formats() -> tuple[FormatSpec, ...]:
    """Return every format: built in, then from the entry points in group adapterkit.formats."""
    return (*BUILTIN, *plugged_in(_GROUP))


def spec(name: str) -> FormatSpec:
    """Return the format of a name.

    Raises:
        UsageError: if there is none; the message lists all.
    """
    return named("format", name, BUILTIN, _GROUP)


def detect(path: Path) -> FormatSpec:
    """Tell the format of an adapter by its content, never by its name.

    Raises:
        NotFoundError: if there is nothing at the path.
        UnknownFormatError: if no format recognises it.
        FormatError: if it is a pipe or device, or cannot be read.
    """
    with readable(path):
        if not path.exists():
            raise NotFoundError(f"no such file or directory{alike(path)}", path=path)
        if not path.is_file() and not path.is_dir():
            raise FormatError("is neither a file nor a directory", path=path)
        if path.is_file() and (left := strangers.of_training(path)):
            raise UnknownFormatError(left, path=path)
        found = _recognised(path, BUILTIN[:-1])
        # What a plug-in knows is no hand-written file.
        found = found or _recognised(path, (*plugged_in(_GROUP), BUILTIN[-1]))
        if found:
            return found
        raise unrecognised(path)


def claims(known: FormatSpec, path: Path) -> bool:
    """Tell whether a format takes a path for its own."""
    return _recognised(path, (known,)) is known


def folder_format(folder: Path, names: Iterable[str]) -> FormatSpec | None:
    """Return the format of which a folder is one adapter; None if it only holds some.

    Args:
        folder: one without adapter_config.json.
        names: of its files.
    """
    names, below = list(names), [path for path in folder.glob("*/") if path.is_dir()]
    for known in formats():
        if known.probe and (known.own_files or known.marked(names)):
            probe = _function(known.probe)
            if probe(folder) and (known.marked(names) or not any(map(probe, below))):
                return known
    return None


def by_suffix(suffix: str) -> FormatSpec | None:
    """Return the format that a destination's suffix means, None if it means none."""
    suffix = suffix.lower()
    for known in BUILTIN:
        if suffix in known.suffixes:
            return known
    added: tuple[FormatSpec, ...] = plugged_in(_GROUP) if suffix else ()
    return next((known for known in added if suffix in known.suffixes), None)


def added_suffixes() -> frozenset[str]:
    """Return the file suffixes of the formats that other packages bring."""
    added: tuple[FormatSpec, ...] = plugged_in(_GROUP)
    return frozenset(suffix for known in added for suffix in known.suffixes)


def _recognised(path: Path, specs: Iterable[FormatSpec]) -> FormatSpec | None:
    start = _first_bytes(path)
    for known in specs:
        if known.magic and start.startswith(known.magic, known.magic_at):
            return known
        if known.own_files and _function(known.probe)(path):
            return known
    config = _config(path)
    claims = [k for k in specs if k.config_match and _matches(config, k.config_match)]
    claims += [k for k in specs if not config.keys().isdisjoint(k.config_keys)]
    if claims:
        # Some programs write the fields of two formats, and the weights of one.
        return next((known for known in claims if _has_weights(path, known)), claims[0])
    return next((known for known in specs if known.probe and _function(known.probe)(path)), None)


def _matches(config: Mapping[str, Any], wanted: Mapping[str, tuple[str, ...]]) -> bool:
    return all(
        name in config and (not values or config[name] in values) for name, values in wanted.items()
    )


def _has_weights(path: Path, known: FormatSpec) -> bool:
    folder = path if path.is_dir() else path.parent
    patterns = [name for name in known.files if name != _CONFIG]
    return any(file.is_file() for name in patterns for file in folder.glob(name))


def _first_bytes(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(16)


def _config(path: Path) -> Mapping[str, Any]:
    """Return the adapter_config.json that describes a path; empty if there is none.

    It does not describe what lies beside it and is told as something else by itself.
    """
    own = any(fnmatch(path.name, name) for name in (*_adapter_files(), _INDEX))
    if path.is_file() and not own and strangers.named(path):
        return {}
    folder = path if path.is_dir() else path.parent
    config = folder / _CONFIG
    if not config.is_file() and path.is_dir():
        inner = sorted(path.glob(f"*/{_CONFIG}"))
        config = inner[0] if inner else config
    return read_json_object(config) if config.is_file() else {}
