"""Print a line for each fault of storage and each changed flag: result | what is done | what must happen | what did.

python tests/faults/table.py
"""

import re
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = ("test_contract_storage.py", "test_contract_foreign_files.py", "test_contract_changed_flags.py")


class Table:
    """Gathers what tests tell with the fixture `case`."""

    def __init__(self):
        self.lines = []

    def pytest_runtest_logreport(self, report):
        told = dict(report.user_properties)
        if report.when == "call" and "case" in told:
            seen = re.sub(r"/\S*/(?=[\w.-]+)", "", str(told.get("seen", "")))  # temporary folders
            self.lines.append(" | ".join([report.outcome, *told["case"], seen]))
        elif report.skipped:
            self.lines.append(f"skipped | {report.nodeid} | {report.longrepr[-1]}")


if __name__ == "__main__":
    table = Table()
    options = ["-qq", "--all", "--no-header", "--show-capture=no", "-p", "no:cacheprovider", "-p", "no:warnings"]
    status = pytest.main([*options, *(str(TESTS / name) for name in FILES), *sys.argv[1:]], plugins=[table])
    print(*table.lines, sep="\n")
    sys.exit(status)
