"""FLOP formulas for ``torch.utils.flop_counter``, which learns them when it is imported.

Importing it here would import Triton too: half a second for everybody, for what few count.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable

COUNTER = "torch.utils.flop_counter"
_formulas: dict = {}  # until the counter is there


def register_flop_formula(op, formula: Callable) -> None:
    """Count `op`, an operator of torch.ops, by `formula`: from its arguments, tensors as shapes, to
    FLOPs. One that the counter has already stays."""
    _formulas[op] = formula
    if COUNTER in sys.modules:
        _hand_over(sys.modules[COUNTER])


def _hand_over(counter) -> None:
    for op, formula in _formulas.items():
        if op not in counter.flop_registry:
            counter.register_flop_formula(op)(formula)
    _formulas.clear()


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it lets the others find the counter, and adds to what is executed."""

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _hand_over(module)

        spec.loader.exec_module = exec_module
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
