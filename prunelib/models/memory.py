"""Name the setting to reduce when memory runs out."""

import functools
import inspect
from collections.abc import Callable

from prunelib.io import first_line


class OutOfMemory(RuntimeError):
    """Work did not fit into memory; the message names the setting that takes less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of Python or of torch on a processor or an accelerator."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or (not isinstance(error, OutOfMemory) and should_reduce_batch_size(error))


def says_what_fits(setting: str, otherwise: str) -> Callable[[Callable], Callable]:
    """Decorator: where memory runs out, raise `OutOfMemory` with half of the keyword argument `setting`, else `otherwise`."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapper(*args: object, **kwargs: object) -> object:
            try:
                return function(*args, **kwargs)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                now = kwargs.get(setting, inspect.signature(function).parameters[setting].default)
                remedy = f"{setting}={now // 2} instead of {now}" if isinstance(now, int) and now > 1 else otherwise
                raise OutOfMemory(f"{function.__name__} ran out of memory ({first_line(error)}): take {remedy}") from error

        return wrapper

    return decorate
