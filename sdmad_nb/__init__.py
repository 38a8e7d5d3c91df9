__version__ = "0.1.0"


def __getattr__(name):  # `from sdmad_nb import SDMAD, Config` imports what it needs; `import sdmad_nb` no torch
    from importlib import import_module
    homes = {"SDMAD": "sdmad_nb.app.sdmad", "Config": "sdmad_nb.core.config"}
    if name not in homes: raise AttributeError(f"module 'sdmad_nb' has no attribute {name!r}")
    return getattr(import_module(homes[name]), name)
