"""What a format is: a name, how its files are told, and the functions that read and write it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.late import called
from adapterkit.notes import Provenance

if TYPE_CHECKING:
    from adapterkit.formats.protocol import FormatOptions, Lister, Reader, Writer  # noqa: TC004  (slow to import)
    from adapterkit.model import AdapterTensorSet
    from adapterkit.notes import Loss

CONFIG = "adapter_config.json"


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

    def marked(self, names: Iterable[str]) -> bool:
        """Tell whether one of the names is that of a file of this format's directories alone."""
        own = [pattern for pattern in self.files if pattern != CONFIG]
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
        found: AdapterTensorSet = called(self.reader)(path, options)
        if found.provenance is not None:
            return found
        return found.replace(provenance=Provenance(path, self.name))

    def losses(self, adapter: AdapterTensorSet, options: FormatOptions) -> Sequence[Loss]:
        """List everything of the adapter that this format cannot hold."""
        return called(self.lister)(adapter, options)

    def write(self, adapter: AdapterTensorSet, path: Path, options: FormatOptions) -> None:
        """Write an adapter to a path where nothing is."""
        called(self.writer)(adapter, path, options)
