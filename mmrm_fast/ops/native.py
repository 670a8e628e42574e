"""The compiled module `mmrm_fast._native`, or None where it was not built."""

import functools
import warnings
from types import ModuleType


@functools.cache
def native() -> ModuleType | None:
    """Return the compiled module; without it, warn once and return None, so that callers use their reference."""
    try:
        from mmrm_fast import _native
    except ImportError as error:
        warnings.warn(f"mmrm_fast runs its slower references, the native module did not load: {error}", stacklevel=2)
        return None
    return _native
