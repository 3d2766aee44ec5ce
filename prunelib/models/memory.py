"""Out of memory, in words: which setting to make smaller."""

import functools
import inspect
from collections.abc import Callable

import torch

ALLOCATOR = "can't allocate memory"  # torch's words on a processor, where it raises a plain RuntimeError


class OutOfMemory(RuntimeError):
    """Work did not fit into the memory; the message names the setting that takes less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's and numpy's, torch's on an accelerator and on a processor."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and not isinstance(error, OutOfMemory) and ALLOCATOR in str(error)
    )


def says_what_fits(setting: str, otherwise: str) -> Callable[[Callable], Callable]:
    """Decorator: where memory runs out, raise `OutOfMemory` with half of the keyword argument `setting`.

    Where that is 1 already, or None, the remedy is `otherwise`.
    """

    def decorate(function: Callable) -> Callable:
        default = inspect.signature(function).parameters[setting].default

        @functools.wraps(function)
        def wrapper(*args: object, **kwargs: object) -> object:
            try:
                return function(*args, **kwargs)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                now = kwargs.get(setting, default)
                remedy = f"{setting}={now // 2} instead of {now}" if isinstance(now, int) and now > 1 else otherwise
                first_line = (str(error).splitlines() or [""])[0]
                reason = f" ({first_line})" if first_line else ""
                raise OutOfMemory(f"{function.__name__} ran out of memory{reason}: take {remedy}") from error

        return wrapper

    return decorate
