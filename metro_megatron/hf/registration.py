"""`import metro_megatron` makes transformers' Auto classes know METRO-LM, without a folder's own code.

Nothing here loads transformers or torch: its modules that hold the Auto classes are waited for, and ours are registered
when those have been loaded, or at once where they have been already.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
AUTO_MODELS = "transformers.models.auto.modeling_auto"
LAYERS = "transformers.modeling_layers"
OUR_CONFIG = "metro_megatron.hf.configuration_metro"
OUR_MODELS = "metro_megatron.hf.modeling_metro"


class WhenLoaded(MetaPathFinder):
    """Calls a function once, when a module has been loaded. It finds no module itself."""

    def __init__(self, name: str, call: Callable[[], object]):
        self.name, self.call = name, call

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_call(module: ModuleType) -> None:
            load(module)
            self.call()

        spec.loader.exec_module = load_and_call  # type: ignore[method-assign]
        return spec


def when_loaded(name: str, call: Callable[[], object]) -> None:
    """Call it now if the module is there, or else when it is loaded, if it ever is."""
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, WhenLoaded(name, call))


def register() -> None:
    """Each module loads the next one, and ours, the last, are registered; it does not matter which is asked for first.

    LAYERS stands between because our classes need it and it needs AUTO_MODELS.
    """
    when_loaded(AUTO_CONFIG, partial(import_module, OUR_CONFIG))
    when_loaded(OUR_CONFIG, _register_config)
    when_loaded(AUTO_MODELS, partial(import_module, LAYERS))
    when_loaded(LAYERS, partial(import_module, OUR_MODELS))
    when_loaded(OUR_MODELS, _register_models)


def _register_config() -> None:
    config = import_module(OUR_CONFIG).MetroConfig
    import_module(AUTO_CONFIG).AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models() -> None:
    """Where an Auto class stands for two of ours, config.json's architectures say which one was saved."""
    ours, auto_models = import_module(OUR_MODELS), import_module(AUTO_MODELS)
    also = {
        "AutoModelForMaskedLM": ours.MetroForAuxiliaryMaskedLM,
        "AutoModelForPreTraining": ours.MetroForReplacedTokenDetection,
    }
    for auto_name, name in import_module(OUR_CONFIG).MODELS.items():
        if hasattr(auto_models, auto_name):
            model = getattr(ours, name)
            models = (model, also[auto_name]) if auto_name in also else model
            getattr(auto_models, auto_name)._model_mapping.register(model.config_class, models, exist_ok=True)
