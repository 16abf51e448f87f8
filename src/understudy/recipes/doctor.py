"""What ``understudy doctor`` says: the machine, versions, extras, tools, networks, transforms."""

from __future__ import annotations

import os
import re
import shutil
from importlib import metadata

from understudy.data.view_spec import TRANSFORM_PARAMETERS
from understudy.evaluate.browser import BROWSER_NAMES
from understudy.models.catalog import CATALOG, PREFIXES
from understudy.recipes.run import home_folder
from understudy.runtime import hardware_facts, package_versions

# Of one requirement in a distribution's metadata: name, extras of it, and the extra it belongs to.
REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(?:\[(?P<of>[^]]*)\])?.*?;\s*extra\s*==\s*['\"](?P<extra>[^'\"]+)['\"]"
)

# Programs that are no Python packages: what for -> names, of which the last Debian's package.
TOOLS: dict[str, tuple[str, ...]] = {
    "native kernels, C files": ("cc", "gcc"),
    "C files for Cortex-M": ("arm-none-eabi-gcc", "gcc-arm-none-eabi"),
    "Cortex-M without a board": ("qemu-system-arm", "qemu-system-arm"),
    "TFLM's instructions": ("valgrind", "valgrind"),
    "profile --host": ("ssh", "openssh-client"),
    "web pages, to build": ("npm", "npm"),
    "web pages, to run": (*BROWSER_NAMES, "chromium"),
}


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
        *(f"  {extra:16}{extra_state(extra, names)}" for extra, names in extras().items()),
        "Tools",
        *(f"  {purpose:26}{tool_state(names)}" for purpose, names in TOOLS.items()),
        f"Networks\n  {', '.join([*CATALOG, 'module:callable', *PREFIXES.values()])}",
        f"Transforms\n  {', '.join(TRANSFORM_PARAMETERS)}",
    ]
    return "\n".join(lines)


def extras() -> dict[str, tuple[str, ...]]:
    """Return every extra with the packages that it brings, those of the extras in it among them."""
    named: dict[str, list[str]] = {}
    inner: dict[str, list[str]] = {}
    for text in metadata.requires("understudy") or ():
        found = REQUIREMENT.match(text)
        if found is None:  # what every installation has
            continue
        names = named.setdefault(found["extra"], [])
        if found["name"] == "understudy":
            inner.setdefault(found["extra"], []).extend(found["of"].replace(" ", "").split(","))
        else:
            names.append(found["name"])

    def packages(extra: str) -> list[str]:
        deeper = [name for other in inner.get(extra, ()) for name in packages(other)]
        return [*named[extra], *deeper]

    return {extra: tuple(dict.fromkeys(packages(extra))) for extra in named}


def tool_state(names: tuple[str, ...]) -> str:
    """Return where a program is or which package of Debian has it."""
    *programs, package = names
    found = next((path for program in programs if (path := shutil.which(program))), None)
    return found or f"{programs[0]} missing: apt install {package}"


def extra_state(extra: str, packages: tuple[str, ...]) -> str:
    """Return the versions of an extra's packages and, where one is not there, how to install it."""
    found, absent = [], []
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            absent.append(package)
    if absent:
        found.append(f'{", ".join(absent)} missing: pip install "understudy[{extra}]"')
    return ", ".join(found)
