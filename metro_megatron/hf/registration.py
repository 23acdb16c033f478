"""`import metro_megatron` makes transformers' Auto classes know METRO-LM, without a folder's own code.

Nothing here loads transformers or torch: its modules that hold the Auto classes are waited for, and ours are registered
when those have been loaded, or at once where they have been already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
AUTO_MODELS = "transformers.models.auto.modeling_auto"
LAYERS = "transformers.modeling_layers"
OUR_CONFIG = "metro_megatron.hf.configuration_metro"
OUR_MODELS = "metro_megatron.hf.modeling_metro"
OUR_PARTS = tuple(f"metro_megatron.hf.{name}_metro" for name in ("positions", "encoder", "heads"))
"""What OUR_MODELS loads."""


class WhenLoaded(MetaPathFinder):
    """Calls a function whenever its module has been executed: the first time, again after a failure, by a reload.

    It stays among the finders, and to be asked for a module, without loading it, changes nothing. While a module of
    ours is being loaded, calls wait: they would load others that need it whole.
    """

    def __init__(self, calls: Mapping[str, Callable[[], object]]):
        self.calls = calls
        self.loading: list[str] = []
        """Modules of ours that are being loaded, the innermost last."""
        self.waiting: list[Callable[[], object]] = []

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.calls:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute, call = spec.loader.exec_module, self.calls[name]

        def execute_and_call(module: ModuleType) -> None:
            own = [name] if name.startswith("metro_megatron.") else []
            self.loading += own
            try:
                execute(module)
            finally:
                for _ in own:
                    self.loading.remove(name)
            if call not in self.waiting:
                self.waiting.append(call)
            if not self.loading:
                calls, self.waiting = self.waiting, []
                for waiting in calls:
                    waiting()

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Now, of the modules that are loaded, and whenever one of the others is; it does not matter which comes first."""
    if any(isinstance(finder, WhenLoaded) for finder in sys.meta_path):
        return
    calls = {
        AUTO_CONFIG: _register_config,
        OUR_CONFIG: _register_config,
        AUTO_MODELS: _register_models,
        LAYERS: _register_models,
        OUR_MODELS: _register_models,
        **dict.fromkeys(OUR_PARTS, _register_models),
    }
    sys.meta_path.insert(0, WhenLoaded(calls))
    for name in calls:
        if name in sys.modules:
            calls[name]()


def _register_config() -> None:
    """Where ours is still being loaded, it loads theirs, and this is called again behind it."""
    config = getattr(import_module(OUR_CONFIG), "MetroConfig", None)
    if config is not None:
        import_module(AUTO_CONFIG).AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models() -> None:
    """Each module loads the next one, AUTO_MODELS, LAYERS and ours, unless it is just being loaded: then this is called
    again behind it. LAYERS stands between because our classes need it and it needs AUTO_MODELS.

    Where an Auto class stands for two of ours, config.json's architectures say which one was saved.
    """
    if not hasattr(import_module(LAYERS), "GradientCheckpointingLayer"):
        return
    names = import_module(OUR_CONFIG).MODELS
    ours, auto_models = import_module(OUR_MODELS), import_module(AUTO_MODELS)
    if not all(hasattr(ours, name) for name in names.values()):
        return
    also = {
        "AutoModelForMaskedLM": ours.MetroForAuxiliaryMaskedLM,
        "AutoModelForPreTraining": ours.MetroForReplacedTokenDetection,
    }
    for auto_name, name in names.items():
        if hasattr(auto_models, auto_name):
            model = getattr(ours, name)
            models = (model, also[auto_name]) if auto_name in also else model
            getattr(auto_models, auto_name)._model_mapping.register(model.config_class, models, exist_ok=True)
