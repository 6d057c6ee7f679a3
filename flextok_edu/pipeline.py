"""A door that stays open: `python -m flextok_edu.pipeline` is `flextok_run`. See `flextok_edu.apps.run`."""

from . import _MODULES, _door

__getattr__ = _door({n: _MODULES[n] for n in ("RunConfig", "run")}, __name__)

if __name__ == "__main__":
    from .apps.run import run_main

    run_main()
