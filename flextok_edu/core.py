"""A door that stays open: what was `flextok_edu.core` has moved to `flextok_edu.engine`."""

from . import _MODULES, _door

__getattr__ = _door({n: m for n, m in _MODULES.items() if m.startswith("engine.")}, __name__)
