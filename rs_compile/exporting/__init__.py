"""A rewritten model as a file that other runtimes load, and what such a file says of itself."""

from rs_compile.exporting.errors import ExportError
from rs_compile.exporting.export import export
from rs_compile.exporting.metadata import Info, info

__all__ = ["ExportError", "Info", "export", "info"]
