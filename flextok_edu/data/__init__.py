"""Pictures: scenes, folders, sets, sources. The names that most programs need can be imported from here."""

from .. import _MODULES, _door

__getattr__ = _door({n: m for n, m in _MODULES.items() if m.startswith("data.")}, __name__)
