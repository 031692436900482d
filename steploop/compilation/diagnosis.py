"""Says which line of the user's code cannot be captured, and what to write instead."""

import linecache
from pathlib import Path
from types import TracebackType

import torch

import steploop
from steploop.compilation.inductor import reads_a_value
from steploop.errors import CompileError

__all__ = ["diagnosed"]

_LIBRARIES = tuple(str(Path(module.__file__).parent) for module in (torch, steploop) if module.__file__)
_READS = (
    "reads a tensor's value in Python (.item(), float(), bool(), `if`, a mask as an index), but a graph runs without Python. "
    "Select with torch.where(condition, a, b) in the place of `if`, keep shapes fixed, and read numbers after the step "
    "from the state that it returned."
)


def diagnosed(error: BaseException) -> CompileError:
    """The error for a train step that could not be traced: where, what, and what to write instead."""
    where, line = _where(error)
    if reads_a_value(error):
        what = _READS
    elif isinstance(error, CompileError):
        what = str(error)
    else:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        what = f"fails while it is traced with tensors that have no values: {type(error).__name__}: {first}"
    return CompileError(
        f"This train step cannot be captured as one graph.\n{where}{line}It {what}\n"
        "Or train without compiling; mode='auto' goes on in eager by itself."
    )


def _where(error: BaseException) -> tuple[str, str]:
    """The innermost line that is neither torch's nor ours; else the innermost of an optimizer."""
    found, trace = None, error.__traceback__
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith((*_LIBRARIES, "<")):
            found = trace
        trace = trace.tb_next
    if found is None or _reached_library_optimizer(found):
        found = _last_in(error.__traceback__, str(Path(torch.optim.__file__).parent)) or found
    if found is None:
        return "", ""
    code, number = found.tb_frame.f_code, found.tb_lineno
    source = linecache.getline(code.co_filename, number).strip()
    return f'  File "{code.co_filename}", line {number}, in {code.co_name}\n', f"    {source}\n" if source else ""


def _reached_library_optimizer(found: TracebackType) -> bool:
    """Whether the error came from inside a torch optimizer that the user's line only called."""
    return _last_in(found, str(Path(torch.optim.__file__).parent)) is not None


def _last_in(trace: TracebackType | None, folder: str) -> TracebackType | None:
    found = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(folder):
            found = trace
        trace = trace.tb_next
    return found
