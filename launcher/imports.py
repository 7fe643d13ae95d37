"""The check that the packages come from this clone, for the programs of this folder.

Imports nothing that takes time: launcher/main.py calls it before it can listen for signals. Called by launcher/preflight.py too.
"""

import importlib.util
from pathlib import Path

PACKAGES = ("launcher", "train", "parallel", "model", "kernels", "data")


def check_imports(root: Path) -> None:
    """RuntimeError unless every package of Switchyard is found in this clone.

    The folders have no __init__.py, so a regular package of the same name (PyPI has a `kernels`) wins over them
    wherever it lies.
    """
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else list(spec.submodule_search_locations or [str(spec.origin)])
        if not places or Path(places[0]).resolve() != (root / name).resolve():
            raise RuntimeError(
                f"the package {name} must come from {root / name}, but Python finds {places[0] if places else 'none'}: "
                f"uninstall that one (pip uninstall {name}) or take its folder off PYTHONPATH"
            )
