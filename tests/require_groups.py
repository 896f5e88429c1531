"""A pytest plugin for test groups, loaded by tests/conftest.py with `pytest_plugins = ["tests.require_groups"]`.

A group is a directory under tests/. Every test carries its group as a marker (`pytest -m "not distributed"`), and a CI
run (CI=true) of all groups fails when a required one ran no test: a suite that skips what it should prove is not green.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GROUPS = ("unit", "contract", "integration", "distributed", "faults")
REQUIRED = ("unit", "contract", "integration", "distributed")


def group_of(path: str | Path) -> str | None:
    """The group of a test file, None for one outside all groups."""
    parts = Path(path).parts
    if "tests" not in parts:
        return None
    below = parts[len(parts) - parts[::-1].index("tests") :]
    return below[0] if below and below[0] in GROUPS else None


class RequireGroups:
    """Counts what ran and what was skipped in each group."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.ran: dict[str, int] = dict.fromkeys(GROUPS, 0)
        self.skipped: dict[str, list[str]] = {group: [] for group in GROUPS}

    def is_full_ci_run(self) -> bool:
        """Whether this is CI, and nobody chose a part of the tests by hand."""
        chosen = self.config.option.keyword or self.config.option.markexpr or self.config.option.collectonly
        return (
            os.environ.get("CI", "").lower() == "true"
            and self.config.args_source is pytest.Config.ArgsSource.TESTPATHS
            and not chosen
        )

    def idle_groups(self) -> list[str]:
        """The groups that should have run a test and did not."""
        return [group for group in GROUPS if not self.ran[group] and (group in REQUIRED or self.skipped[group])]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if group := group_of(item.path):
                item.add_marker(group)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        # A whole module skipped, by `pytest.importorskip` or `pytest.skip(allow_module_level=True)`.
        if report.skipped and (group := group_of(report.nodeid)):
            self.skipped[group].append(_reason(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        group = group_of(report.nodeid.split("::")[0])
        if group is None:
            return
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped[group].append(_reason(report))
        elif report.when == "call":
            self.ran[group] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.is_full_ci_run() and self.idle_groups():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.is_full_ci_run():
            return
        for group in self.idle_groups():
            reasons = sorted(set(self.skipped[group])) or ["it has no tests"]
            terminalreporter.write_line(
                f"ERROR: required test group tests/{group} ran no test: {'; '.join(reasons)}", red=True, bold=True
            )


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(report.longrepr)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RequireGroups(config), "require-groups")
