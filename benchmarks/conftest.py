from compare import compare, pytest_terminal_summary

__all__ = ["compare", "pytest_terminal_summary"]
