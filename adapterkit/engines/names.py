"""What a loader of diffusion LoRAs does with every module, by how the file spells it.

Such a loader looks for names: what it does not find it drops, mostly without a word. The rows
`[[name]]` of an engine say what becomes of a module, and the first that fits counts: `families`,
`prefixes` and `pairs` are lists (absent for any), `when` an expression over the words of
`name_facts`, `outcome` what is made of it (`applied`, `ignored` or `refused`; `altered` is applied
as another update), with a `code` for the last two. Rows with `after` are asked of what is applied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from adapterkit.architectures.expressions import evaluate
from adapterkit.checks.findings import CoveredModule, Finding, Outcome, Severity
from adapterkit.formats.diffusion.of_base import of_base
from adapterkit.formats.diffusion.table import Model, models
from adapterkit.formats.diffusion.telling import Place, Spelled, placed
from adapterkit.keys import Role
from adapterkit.model import DiffusionSource, Spelling

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from adapterkit.base.model import BaseModel
    from adapterkit.engines.engine import NameRule, Target
    from adapterkit.model import AdapterTensorSet

# Ends of a pair's names -> what rules call it; the first that a module has.
_PAIRS = {
    ".lora_down.weight": "lora_down",
    ".lora_A.weight": "lora_A",
    ".lora.down.weight": "lora.down",
    ".lora_linear_layer.down.weight": "lora_linear_layer",
    ".lora_A.default.weight": "default",
    ".lora_A": "lora_A bare",
    ".processor": "processor",
    ".down.weight": "stream",
}
# Both are in every file of USO; without them ComfyUI knows none of its names.
_USO = {"single_blocks.37.processor.qkv_lora", "double_blocks.18.processor.qkv_lora2"}
_PRODUCTS = (".hada_", ".lokr_")
_DORA = {
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "vector",
    ".lora_magnitude_vector.weight": "vector weight",
    ".lora_magnitude_vector.default.weight": "vector",
    ".magnitude": "magnitude",
}


def cover_names(
    adapter: AdapterTensorSet, target: Target, base: BaseModel | None = None
) -> tuple[list[CoveredModule], list[Finding]]:
    """Return what a loader does with each module of a file in one of the diffusion formats.

    A base tells between models that the file may be for.
    """
    source = adapter.source
    if not isinstance(source, DiffusionSource) or not source.models:
        return [], []  # a rule, or the reader, says why
    known = {model.name: model for model in models()}
    columns = {key.module for key in adapter.tensors if key.role is Role.COLUMN_MAGNITUDE}
    possible = of_base([known[name] for name in source.models], base)
    files = [_File(model, source, frozenset(columns)) for model in possible]
    found = [file.decisions(target.names) for file in files]
    covered = [_covered(pair.module, found[0].get(pair.module)) for pair in adapter.pairs()]
    findings = [
        Finding(rule.code, rule.severity, (module,), message, rule.hint, target.name, rule.fix)
        for module, (rule, message) in found[0].items()
        if rule.code
    ]
    apart = [m for m in found[0] if len({each[m][0].outcome for each in found}) > 1]
    if apart:
        titles = " or ".join(model.title for model in possible)
        message = f"the model may be {titles}, and {target.title} loads it differently there"
        hint = "name it in the file's metadata (modelspec.architecture)"
        findings.append(
            Finding("AK121", Severity.UNCHECKED, tuple(apart), message, hint, target.name)
        )
    return covered, findings


def _covered(module: str, decided: tuple[NameRule, str] | None) -> CoveredModule:
    if decided is None or decided[0].outcome in {"applied", "altered"}:
        return CoveredModule(module, Outcome.APPLIED, module)
    rule, message = decided
    return CoveredModule(module, Outcome(rule.outcome), None, message)


@dataclass(frozen=True)
class _Module:
    """A module of a file and where it stands in a model."""

    name: str
    spelling: Spelling
    place: Place | None

    @property
    def pair(self) -> str:
        """What its pair of factors is called."""
        return next((pair for end, pair in _PAIRS.items() if end in self.spelling.ends), "")

    @property
    def original(self) -> bool:
        """Whether it has a name of the original checkpoint that diffusers does not have."""
        site = self.place.site if self.place else None
        return site is not None and site.part is None and site.row.parts != (site.row.original,)


@dataclass(frozen=True)
class _File:
    """All modules of a file, as those of one model.

    Attributes:
        model: which.
        source: how the file spells them.
        columns: modules with DoRA magnitudes by column.
    """

    model: Model
    source: DiffusionSource
    columns: frozenset[str] = frozenset()

    def decisions(self, rules: Sequence[NameRule]) -> dict[str, tuple[NameRule, str]]:
        """Return the rule that decides on each module, and its message."""
        found: dict[str, tuple[NameRule, str]] = {}
        for module in self.modules:
            known = self.shared | self.facts(module)
            rule = self._first((r for r in rules if not r.after), module, known)
            if rule is not None and rule.outcome == "applied":
                rule = self._first((r for r in rules if r.after), module, known) or rule
            if rule is not None:
                found[module.name] = (rule, rule.message.format_map(known))
        return found

    def _first(
        self, rules: Iterable[NameRule], module: _Module, known: Mapping[str, Any]
    ) -> NameRule | None:
        return next((rule for rule in rules if self._fits(rule, module, known)), None)

    def _fits(self, rule: NameRule, module: _Module, known: Mapping[str, Any]) -> bool:
        return (
            (not rule.families or self.model.name in rule.families)
            and (not rule.prefixes or module.spelling.prefix in rule.prefixes)
            and (not rule.pairs or module.pair in rule.pairs)
            and bool(evaluate(rule.when, known.__getitem__))
        )

    @cached_property
    def modules(self) -> tuple[_Module, ...]:
        """Every module."""
        found: list[_Module] = []
        for name, spelling in self.source.spellings.items():
            spelled = Spelled(spelling.component, spelling.path, spelling.flat)
            found.append(_Module(name, spelling, placed(self.model, spelled)))
        return tuple(found)

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What is true of the file: see `name_facts`."""
        spellings = [module.spelling for module in self.modules]
        names = [s.stem + end for s in spellings for end in s.ends]
        return {
            "title": self.model.title,
            "all_kohya": all(s.prefix.startswith(("lora_unet_", "lora_te")) for s in spellings),
            "any_transformer": any(s.prefix.startswith("transformer.") for s in spellings),
            "any_base_model": any("base_model." in s.prefix for s in spellings),
            "any_kohya": any(s.prefix.startswith("lora_unet_") for s in spellings),
            "any_down": any(m.pair == "lora_down" for m in self.modules),
            "any_alpha": any(s.alpha is not None for s in spellings),
            "any_unnamed": any("lora" not in n and not n.endswith(_NOT_ASKED) for n in names),
            "any_flat_diffusers": any(
                s.flat and not m.original and not (m.place and m.place.encoder)
                for m, s in zip(self.modules, spellings, strict=True)
            ),
            "any_fun": any("blocks_0_cross_attn_k" in s.path for s in spellings),
            "any_uso": {s.stem for s in spellings} >= _USO,
            "any_published_attention": any("img_attn_qkv" in s.path for s in spellings),
            "complete": self._complete(),
        }

    def facts(self, module: _Module) -> dict[str, Any]:
        """Return the facts of one module, by name."""
        spelling, place, ends = module.spelling, module.place, module.spelling.ends
        row = place.site.row if place else None
        peers = self._components.get(_component(module.name), ())
        return {
            "module": module.name,
            "component": _component(module.name),
            "path": spelling.path,
            "prefix": spelling.prefix,
            "flat": spelling.flat,
            "known": place is not None,
            "encoder": bool(place and place.encoder),
            "network": place.encoder.network if place and place.encoder else "",
            "encoder_attention": any(".self_attn." in peer.name for peer in peers),
            "encoder_out": any(peer.name.endswith("out_proj") for peer in peers),
            "encoder_mlp": any(".mlp." in peer.name for peer in peers),
            "original": module.original,
            "native": bool(
                place
                and (place.site.part is None or place.site.row.parts == (place.site.row.original,))
                and (not place.site.row.kohya or place.site.renamed)
            ),
            "published": bool(
                place
                and place.site.part is None
                and place.site.row.kohya
                and not place.site.renamed
            ),
            "fused": module.original and len(row.shares if row else ()) > 1,
            "outside": not any(part.isdecimal() for part in module.name.split(".")[:3]),
            "pair": module.pair,
            "alpha": spelling.alpha is not None,
            "usual_alpha": spelling.alpha == self._usual_alphas.get(_component(module.name)),
            "first_alpha": spelling.alpha == self._first_alphas.get(_component(module.name)),
            "attention": module.name.endswith(_ATTENTION),
            "dora": next((_DORA[end] for end in ends if end in _DORA), ""),
            "by_column": module.name in self.columns,
            "mid": ".lora_mid.weight" in ends,
            "product": any(end.startswith(_PRODUCTS) or end == ".diff" for end in ends),
            "bias": next((e for e in ends if e in {".diff_b", ".lora_B.bias"}), ""),
        }

    @cached_property
    def _components(self) -> Mapping[str, Sequence[_Module]]:
        """The modules of each network."""
        found: dict[str, list[_Module]] = {}
        for module in self.modules:
            found.setdefault(_component(module.name), []).append(module)
        return found

    @cached_property
    def _usual_alphas(self) -> Mapping[str, float]:
        """The commonest alpha of each network, of modules that have one."""
        found: dict[str, float] = {}
        for name, modules in self._components.items():
            stored = [m.spelling.alpha for m in modules if m.spelling.alpha is not None]
            if stored:
                found[name] = Counter(stored).most_common(1)[0][0]
        return found

    @cached_property
    def _first_alphas(self) -> Mapping[str, float]:
        """The first alpha of each network."""
        alphas = [(_component(m.name), m.spelling.alpha) for m in reversed(self.modules)]
        return {name: alpha for name, alpha in alphas if alpha is not None}

    def _complete(self) -> bool:
        """Tell whether every block from the first to the last has all of its modules."""
        blocks: dict[str, dict[int, set[str]]] = {}
        for module in self.modules:
            kind, number, rest = _block(module.name)
            if kind:
                blocks.setdefault(kind, {}).setdefault(number, set()).add(rest)
        return all(
            set(numbers) == set(range(len(numbers))) and self._whole(kind, numbers.values())
            for kind, numbers in blocks.items()
        )

    def _whole(self, kind: str, found: Iterable[set[str]]) -> bool:
        wanted = {
            part.removeprefix(f"{kind}.{{i}}.")
            for row in self.model.names.rows
            if row.written
            for part in row.parts
            if part.startswith(f"{kind}.{{i}}.")
        }
        optional = {name for name in wanted if name.endswith(_OPTIONAL)}
        if kind == "context_refiner":  # Lumina 2's refiners of the context have no modulation
            optional.add("norm1.linear")
        return all(wanted - optional <= names for names in found)


# Ends that say nothing of `lora`: dropped before that is asked, or short for `processor.to_q_lora`.
_NOT_ASKED = (".dora_scale", ".processor")
_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
# Wan has keys and values of an image in some of its models alone.
_OPTIONAL = ("add_k_proj", "add_v_proj")
_DIGITS = 6


def _component(module: str) -> str:
    return module.partition(".")[0]


def _block(module: str) -> tuple[str, int, str]:
    """Return (kind, number, rest) of a module in a block, the component left out."""
    _, _, path = module.partition(".")
    kind, _, rest = path.partition(".")
    number, _, rest = rest.partition(".")
    return (
        (kind, int(number), rest) if number.isdecimal() and len(number) < _DIGITS else ("", 0, "")
    )


def name_facts() -> dict[str, Any]:
    """Return the words of `when` in `[[name]]` rules, with values that are true of no module.

    Of the file: `all_kohya`, `any_kohya`, `any_transformer`, `any_base_model` (prefixes);
    `any_down`, `any_alpha`, `any_unnamed` (a name without `lora` in it, magnitudes left out),
    `any_flat_diffusers`, `any_fun` and `any_uso` (keys by which ComfyUI knows Wan-Fun and USO),
    `any_published_attention` (HunyuanVideo's img_attn_qkv), `complete` (every block, with all its
    modules). Of the module: `module`, `component`, `path` (as it is spelled), `prefix`, `flat`,
    `known`, `encoder`, `network`, `encoder_attention`, `encoder_out`, `encoder_mlp`
    (what there is in its network), `original` (a name that diffusers has not),
    `native` (of ComfyUI), `published` (by another name than ComfyUI's), `fused`, `outside` (of all
    blocks), `pair`, `alpha`, `usual_alpha` and `first_alpha` (in its network), `attention`,
    `dora`, `by_column` (its magnitudes), `mid`, `product`, `bias`.
    """
    empty = _File(models()[0], DiffusionSource((), {}))
    module = _Module("", Spelling("", "", "", "", flat=False, ends=()), None)
    return empty.shared | empty.facts(module)
