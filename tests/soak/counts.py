"""What is counted over all runs: a plugin of pytest that works with several processes too."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Collection, Generator

    from soak.runs import Ended

PROPERTY = "soak"
REPORT = Path(__file__).parents[2] / "build" / "soak.json"


@dataclass
class Counts:
    """What happened in one test.

    Attributes:
        runs: of the program.
        hangs: runs that had to be killed.
        wrong: destinations that are neither as before nor the right bytes.
        replaced: things replaced, changed or removed that nobody asked for.
        left: runs that left something hidden beside the destination.
        codes: runs that ended with another exit code.
        messages: runs that showed a traceback, or did not say what they should.
        worst: most seconds from a signal, or the start of a run that fails, to the end.
        faults: all of that in words.
    """

    runs: int = 0
    hangs: int = 0
    wrong: int = 0
    replaced: int = 0
    left: int = 0
    codes: int = 0
    messages: int = 0
    worst: float = 0.0
    faults: list[str] = field(default_factory=list[str])

    def add(self, kind: str, what: str) -> None:
        """Count a fault."""
        setattr(self, kind, getattr(self, kind) + 1)
        self.faults.append(f"{kind}: {what}")

    def ran(self, ended: Ended, codes: Collection[int], *, trace: bool = False) -> None:
        """Count a run; all but a hang must end with one of some codes, without a traceback."""
        self.runs += 1
        if ended.hung:
            self.add("hangs", str(ended))
            return
        self.worst = max(self.worst, ended.seconds)
        if ended.code not in codes:
            self.add("codes", f"expected {sorted(codes)}: {ended}")
        if "Traceback" in ended.stderr and not trace:
            self.add("messages", f"a traceback: {ended}")

    def settle(self) -> None:
        """Fail if there was any fault."""
        if self.faults:
            shown = "\n".join(self.faults[:20])
            pytest.fail(f"{len(self.faults)} faults in {self.runs} runs\n{shown}", pytrace=False)


@pytest.fixture
def counts(record_property: Any) -> Generator[Counts]:
    """Counts of this test, which reach the summary whether it passes or not."""
    counts = Counts()
    yield counts
    record_property(PROPERTY, asdict(counts))


class Summary:
    """The table at the end, of all tests of all processes."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect; counts are complete when a test is torn down."""
        if report.when == "teardown":
            found = dict(report.user_properties).get(PROPERTY)
            if isinstance(found, dict):
                self.tests[report.nodeid] = found

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table, and write it with all faults as JSON."""
        if not self.tests:
            return
        numeric = [f.name for f in fields(Counts) if f.name != "faults"]
        rows: dict[str, Counts] = {}
        for node, found in self.tests.items():
            name = node.rpartition("::")[2].partition("[")[0].removeprefix("test_")
            for row in (rows.setdefault(name, Counts()), rows.setdefault("all", Counts())):
                for key in numeric:
                    combine = max if key == "worst" else int.__add__
                    setattr(row, key, combine(getattr(row, key), found[key]))
        terminalreporter.section("soak")
        terminalreporter.write_line(f"{'':44}" + "".join(f"{key:>10}" for key in numeric))
        total = rows.pop("all")
        for name, row in [*rows.items(), ("all", total)]:
            shown = [f"{v:.2f}" if isinstance(v := getattr(row, k), float) else v for k in numeric]
            terminalreporter.write_line(f"{name[:43]:44}" + "".join(f"{v:>10}" for v in shown))
        REPORT.parent.mkdir(exist_ok=True)
        document = {"total": {key: getattr(total, key) for key in numeric}, "tests": self.tests}
        REPORT.write_text(json.dumps(document, indent=1) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Collect where reports arrive: not in the workers of xdist."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Summary())
