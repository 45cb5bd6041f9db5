"""What the plan needs besides torch and triton: read without importing any of it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


@dataclass(frozen=True)
class Package:
    """A package of PyPI.

    Args:
        name: on PyPI.
        module: that it installs.
        use: what for.
        required: nothing runs without it; else one step or the plots are left out, and said to be.
    """

    name: str
    module: str
    use: str
    required: bool = True

    @property
    def found(self) -> str:
        """The installed version, "" where there is none."""
        try:
            if find_spec(self.module) is None:
                return ""
        except (ImportError, ValueError):
            return ""
        try:
            return version(self.name)
        except PackageNotFoundError:  # a source tree on the path
            return "installed"


PACKAGES = (
    Package("timm", "timm", "DeiT, BEiT, ResNet"),
    Package("safetensors", "safetensors", "weights of the package's own small models"),
    Package("numpy", "numpy", "medians and quartiles"),
    Package("pillow", "PIL", "imported by timm and by the command line"),
    Package("tabulate", "tabulate", "tables"),
    Package("rich", "rich", "progress"),
    Package("matplotlib", "matplotlib", "plots of report.html", required=False),
    Package("pytest", "pytest", "the step `tests`", required=False),
    Package("hypothesis", "hypothesis", "the step `tests`", required=False),
)


def missing() -> list[Package]:
    """Those that are not installed here."""
    return [package for package in PACKAGES if not package.found]


def table() -> str:
    """All of them with what was found, and the command that installs the rest."""
    wide = max(len(package.name) for package in PACKAGES)
    lines = ["needed besides torch and triton:"]
    for package in PACKAGES:
        optional = "" if package.required else " (optional)"
        lines.append(f"  {package.name:{wide}}  {package.found or 'MISSING':10}  {package.use}{optional}")
    if names := " ".join(package.name for package in missing()):
        lines += [
            "",
            f"install: python -m pip install {names}",
            f"offline: python -m pip download -d wheels {names}    (where there is a network)",
            f"         python -m pip install --no-index --find-links wheels {names}",
        ]
    else:
        lines += ["", "nothing is missing"]
    return "\n".join(lines)
