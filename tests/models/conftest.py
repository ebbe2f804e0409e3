import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = terminalreporter.getreports("passed")
    if cells := sum(("cell", True) in report.user_properties for report in passed):
        terminalreporter.write_line(f"support matrix: {cells} cells passed")
