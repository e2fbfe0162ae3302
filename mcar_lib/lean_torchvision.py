"""torchvision without torch's compiler, which it imports for one function and which takes longer than all the rest.

What a model needs to be loaded gets torchvision from this module; it is there for others then. The function is there
too: called, it imports what it needs.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo.utils"  # of which torchvision.ops.roi_align wants is_compile_supported


class _StandIn(ModuleType):
    """In place of the compiler's module for as long as torchvision is imported."""

    def is_compile_supported(self, device_type: str) -> Any:
        return importlib.import_module(COMPILER).is_compile_supported(device_type)

    def __getattr__(self, name: str) -> Any:  # another version of torchvision may want something else
        if name.startswith("__"):
            raise AttributeError(name)
        _take_away()
        return getattr(importlib.import_module(COMPILER), name)


def _take_away() -> None:
    if isinstance(sys.modules.get(COMPILER), _StandIn):
        del sys.modules[COMPILER]


sys.modules.setdefault(COMPILER, _StandIn(COMPILER))
try:
    import torchvision

    try:
        from torchvision.io import decode_jpeg
    except ImportError:  # a version without it: Pillow reads as well
        decode_jpeg = None
finally:
    _take_away()

__all__ = ["decode_jpeg", "torchvision"]
