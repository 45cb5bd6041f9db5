"""Results as pages: one HTML file each that needs nothing else, in one design."""

from rs_compile.pages.page import VIRIDIS, check_page, render, write_page

__all__ = ["VIRIDIS", "check_page", "render", "write_page"]
