"""What ``understudy doctor`` says: the machine, versions, extras, networks and transforms."""

from __future__ import annotations

import importlib.util
import os
import shutil
from importlib import metadata

from understudy.data.view_spec import TRANSFORM_PARAMETERS
from understudy.models.catalog import CATALOG, PREFIXES
from understudy.recipes.run import home_folder
from understudy.runtime import hardware_facts, package_versions

# Extra -> the package that it brings.
EXTRAS = {"timm": "timm", "transformers": "transformers", "dev": "pytest"}


def describe() -> str:
    """Return the whole description as text."""
    import torch

    facts = hardware_facts()
    home = home_folder()
    free = shutil.disk_usage(next(p for p in (home, *home.parents) if p.exists())).free
    lines = [
        "Machine",
        f"  processor     {facts['processor']} ({facts['machine']})",
        f"  cores         {facts['num_cores']} usable of {os.cpu_count()}",
        f"  memory        {facts['memory_bytes'] / 2**30:.1f} GiB",
        f"  system        {facts['system']}",
        f"  CPU kernels   {torch.backends.cpu.get_cpu_capability()}",
        f"  GPU           {facts.get('gpu', 'none that torch can use')}",
        f"  stored data   {home} ({free / 2**30:.1f} GiB free)",
        "Versions",
        *(f"  {name:18}{version}" for name, version in package_versions().items()),
        "Extras",
        *(f"  {extra:16}{extra_state(extra, package)}" for extra, package in EXTRAS.items()),
        f"Networks\n  {', '.join([*CATALOG, 'module:callable', *PREFIXES.values()])}",
        f"Transforms\n  {', '.join(TRANSFORM_PARAMETERS)}",
    ]
    return "\n".join(lines)


def extra_state(extra: str, package: str) -> str:
    """Return the installed version, or how to install the extra."""
    if importlib.util.find_spec(package) is None:
        return f'missing: pip install "understudy[{extra}]"'
    return metadata.version(package)
