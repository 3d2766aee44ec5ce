"""A laboratory for making language models shallower and thinner, and for healing them."""

import sys
from importlib.util import find_spec

_REGISTRY = "transformers.models.auto.configuration_auto"


class _SlicedModels:
    """Import hook: transformers, which takes seconds to import, has sliced models registered when it is first imported."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == _REGISTRY:
            sys.meta_path.remove(cls)
            spec = find_spec(name)
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), cls.register(module))
            return spec
        return None

    @staticmethod
    def register(registry) -> None:
        class SlicedConfig(registry.PreTrainedConfig):
            model_type = "prunelib_sliced"

            @classmethod
            def from_dict(cls, record, **options):
                from prunelib.slicing.modeling import config_class  # that of the family of this model

                return config_class(record).from_dict(record, **options)

        registry.AutoConfig.register("prunelib_sliced", SlicedConfig, exist_ok=True)


if _REGISTRY in sys.modules:
    _SlicedModels.register(sys.modules[_REGISTRY])
else:
    sys.meta_path.insert(0, _SlicedModels)
