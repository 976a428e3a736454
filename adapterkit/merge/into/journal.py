"""What an interrupted merge had finished, so that it can go on."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit.errors import DestinationExistsError, UsageError, WriteError
from adapterkit.json_file import read_json_object
from adapterkit.merge.into.report import TensorReport
from adapterkit.storage import synced

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from adapterkit.merge.planning import Source

JOURNAL = "adapterkit-merge.json"


@dataclass
class Journal:
    """The list of finished segments of the files in a staging directory.

    Attributes:
        path: where it is kept.
        plan: hash of everything that the output depends on.
        files: file name -> segment number -> the reports of its tensors.
    """

    path: Path
    plan: str
    files: dict[str, Any] = field(default_factory=dict[str, Any])

    def finished(self, file: Path, size: int, segment: int) -> list[TensorReport] | None:
        """Return the reports of a finished segment, or None if it is to be written."""
        known: list[dict[str, Any]] | None = self.files.get(file.name, {}).get(str(segment))
        if known is None or not file.is_file() or file.stat().st_size != size:
            return None
        found = [dict(each, modules=tuple(each["modules"])) for each in known]
        return [TensorReport(**each) for each in found]

    def finish(self, file: Path, segment: int, reports: Sequence[TensorReport]) -> None:
        """Note a segment that is on the disk; the note itself appears whole or not at all."""
        segments = self.files.setdefault(file.name, {})
        segments[str(segment)] = [asdict(report) for report in reports]
        self.save()

    def save(self) -> None:
        """Write the journal."""
        text = json.dumps({"plan": self.plan, "files": self.files})
        staging = self.path.with_suffix(".tmp")
        staging.write_text(text, encoding="utf-8")
        synced(staging)
        staging.replace(self.path)


def plan_hash(sources: Sequence[Source], files: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """Return a hash of the adapters' tensors, the base's files as they are now, and the settings.

    Base files count by name, size and time of change: hashing them would take longer than merging.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    for source in sources:
        digest.update(f"{source.weight} {dict(source.adapter.scales)}\n".encode())
        digest.update(repr(sorted(source.adapter.settings.items(), key=str)).encode())
        for key, tensor in source.adapter.tensors.items():
            digest.update(f"{key} {tensor.dtype} {tensor.shape}\n".encode())
            digest.update(tensor.tobytes())
    return digest.hexdigest()


@contextmanager
def staged_output(
    destination: Path, plan: str, *, resume: bool, force: bool, single: bool = False
) -> Generator[tuple[Path, Journal]]:
    """Yield a directory beside the destination; rename it there at the end, else remove it.

    With `resume` an interrupt leaves it, as a kill always does, for the next `resume` to go on.

    Args:
        destination: the directory to create, or the file.
        plan: hash of everything that the output depends on.
        resume: go on with what an earlier run of the same plan left.
        force: replace what is at the destination.
        single: the output is one file, which the caller writes under the destination's name.

    Raises:
        DestinationExistsError: if there is something at the destination and `force` is false, or
            something that is no model.
        UsageError: if what is to be resumed is another merge.
        WriteError: if the operating system refuses.
    """
    _check_destination(destination, force=force, single=single)
    staging = destination.with_name(f".{destination.name}.adapterkit-merge")
    kept = False
    try:
        journal = _begun(staging, plan, resume=resume)
        yield staging, journal
        journal.path.unlink()
        _moved(staging, destination, single=single)
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(
            f"could not be written ({reason}); nothing was left behind", path=destination
        ) from error
    except UsageError:
        kept = True
        raise
    except Exception:
        raise
    except BaseException:
        kept = resume  # interrupted or told to end
        raise
    finally:
        if not kept:
            shutil.rmtree(staging, ignore_errors=True)


def _check_destination(destination: Path, *, force: bool, single: bool) -> None:
    if not destination.exists():
        return
    if not single and destination.is_dir() and not any(destination.iterdir()):
        return
    if not force:
        raise DestinationExistsError("exists already; pass --force to replace it", path=destination)
    replaced = destination.is_file() if single else (destination / "config.json").is_file()
    if not replaced:
        kind = "file" if single else "model directory"
        raise DestinationExistsError(
            f"is no {kind}, and is not replaced; name another", path=destination
        )


def _begun(staging: Path, plan: str, *, resume: bool) -> Journal:
    """Take up what an earlier run left, or begin anew."""
    path = staging / JOURNAL
    if resume and path.is_file():
        found = read_json_object(path)
        if found.get("plan") != plan:
            raise UsageError(
                "holds another merge (other adapters, weights, base or options); repeat without "
                "--resume to begin anew",
                path=staging,
            )
        return Journal(path, plan, cast("dict[str, Any]", found.get("files") or {}))
    if staging.is_dir():
        shutil.rmtree(staging)
    staging.mkdir()
    journal = Journal(path, plan)
    journal.save()
    return journal


def _moved(staging: Path, destination: Path, *, single: bool) -> None:
    synced(staging)
    if single:
        (staging / destination.name).replace(destination)
        staging.rmdir()
    elif destination.is_dir() and any(destination.iterdir()):
        old = staging.with_suffix(".replaced")
        destination.replace(old)
        staging.replace(destination)
        shutil.rmtree(old, ignore_errors=True)
    else:
        staging.replace(destination)
