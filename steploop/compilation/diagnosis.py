"""Say which line of a train step cannot be captured, and what to write instead."""

import linecache
from pathlib import Path
from types import TracebackType

import attr
import torch

import steploop
from steploop.compilation.aten_graph import reads_a_value
from steploop.errors import CompileError

__all__ = ["TRACEABLE", "diagnosed"]

# compared with eager over 100 steps in the tests
TRACEABLE = "SGD, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Rprop, ASGD, Adagrad, Adadelta and Muon"  # of torch.optim
_LIBRARIES = tuple(str(Path(module.__file__).parent) for module in (torch, steploop, attr) if module.__file__)
_OPTIMIZERS = str(Path(torch.optim.__file__).parent)
_DISTRIBUTIONS = str(Path(_OPTIMIZERS).parent / "distributions")  # imported by who uses them
_READS = "reads a tensor's value in Python (.item(), float(), bool(), `if`, a mask as an index), but a graph runs without Python."
_INSTEAD = (
    "Select with torch.where(condition, a, b) in the place of `if`, keep shapes fixed, and read numbers after the step, "
    "from the state that it returned."
)


def diagnosed(error: BaseException) -> CompileError:
    """Make the error for a train step that could not be traced: where, why, what to write instead."""
    found = _last(error.__traceback__)
    inside = _last(found, _OPTIMIZERS)  # the user's line only called the optimizer
    if isinstance(error, CompileError):
        what = str(error)
    elif reads_a_value(error) and inside is not None:
        what = f"uses an optimizer that {_READS} These can be captured: {TRACEABLE}."
        found = inside
    elif reads_a_value(error) and _last(found, _DISTRIBUTIONS) is not None:
        what = "lets a distribution check its numbers in Python, but a graph runs without Python. Make it with validate_args=False."
    elif reads_a_value(error):
        what = f"{_READS} {_INSTEAD}"
    else:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        what = f"fails where it runs on tensors without values: {type(error).__name__}: {first}"
    return CompileError(
        f"This train step cannot be captured as one graph.\n{_location(found)}The step {what}\n"
        "Or train without compiling; mode='auto' goes on in eager by itself."
    )


def _last(trace: TracebackType | None, folder: str | None = None) -> TracebackType | None:
    """Find the innermost frame of the user's code, or of a folder of torch's."""
    found = None
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith((*_LIBRARIES, "<")) if folder is None else file.startswith(folder):
            found = trace
        trace = trace.tb_next
    return found


def _location(trace: TracebackType | None) -> str:
    """Format the line as Python's tracebacks do."""
    if trace is None:
        return ""
    code, number = trace.tb_frame.f_code, trace.tb_lineno
    source = linecache.getline(code.co_filename, number).strip()
    return f'  File "{code.co_filename}", line {number}, in {code.co_name}\n    {source}\n'
