"""A schedule found for a target on a user's pictures: `rs_compile.search(model, images, speedup=1.5)`."""

from rs_compile.search.pictures import SearchError
from rs_compile.search.result import SearchResult
from rs_compile.search.rows import Row
from rs_compile.search.run import search

__all__ = ["Row", "SearchError", "SearchResult", "search"]
