"""The model type of sliced models, made known to transformers without importing it. Standard library only.

A folder written by `save_pretrained` of a sliced model names the model type `MODEL_TYPE` in its config.json. AutoConfig looks
types up in a registry that exists once transformers has loaded its module `_REGISTRY`: the type is entered there as soon as
that module is there, now or when something imports it. The classes themselves (`prunelib.slicing.modeling`, which needs torch) are
imported when the first such config.json is read.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

MODEL_TYPE = (
    "prunelib_sliced"  # models.architectures.SLICED_MODEL_TYPE, which is not imported here: transformers may not be yet
)
_REGISTRY = "transformers.models.auto.configuration_auto"


def register_model_type() -> None:
    """Make transformers know `MODEL_TYPE`, now if it is imported, else when it will be. Calling it again changes nothing."""
    if _REGISTRY in sys.modules:
        _enter(sys.modules[_REGISTRY])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _enter(registry: ModuleType) -> None:
    from transformers.configuration_utils import PreTrainedConfig

    class SlicedConfig(PreTrainedConfig):
        """Stands for the configurations of all sliced families: reading one gives that of its family."""

        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict, **kwargs):
            from prunelib.slicing.modeling import config_class

            return config_class(config_dict).from_dict(config_dict, **kwargs)

    registry.AutoConfig.register(MODEL_TYPE, SlicedConfig, exist_ok=True)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself; when `_REGISTRY` is imported, it steps aside and has the module found, run and then entered."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenEnter(spec.loader)
        return spec


class _ThenEnter(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module is its own loader's: what asks it for its source finds it.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _enter(module)
