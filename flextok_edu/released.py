"""A door that stays open: `from flextok_edu.released import load_flextok`. See `flextok_edu.io.released`."""

from . import _MODULES, _door

__getattr__ = _door({n: _MODULES[n] for n in ("load_flextok", "load_vae", "save_released")}, __name__)
