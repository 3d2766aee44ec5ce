"""A laboratory for making language models shallower and thinner without retraining them."""

import importlib.util
import sys
from types import ModuleType

_REGISTRY = "transformers.models.auto.configuration_auto"


def _register_sliced_models(registry: ModuleType) -> None:
    """Enter the model type of sliced models; `prunelib.slicing`, which needs torch, is imported when one is loaded."""
    from transformers.configuration_utils import PreTrainedConfig

    class SlicedConfig(PreTrainedConfig):
        model_type = "prunelib_sliced"

        @classmethod
        def from_dict(cls, config_dict: dict, **kwargs):
            from prunelib.slicing.modeling import config_class  # that of the family of this model

            return config_class(config_dict).from_dict(config_dict, **kwargs)

    registry.AutoConfig.register("prunelib_sliced", SlicedConfig, exist_ok=True)


class _WhenTransformersIsImported:
    """Import hook: transformers takes seconds to import, so it is not imported only to register a model type."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: ModuleType | None = None):
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), _register_sliced_models(module))
        return spec


if _REGISTRY in sys.modules:
    _register_sliced_models(sys.modules[_REGISTRY])
else:
    sys.meta_path.insert(0, _WhenTransformersIsImported)
