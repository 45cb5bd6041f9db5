"""Features of pictures by the million: `rs_compile.embed(model, schedule, source)` and `rs-compile embed`."""

from rs_compile.embed.errors import EmbedError
from rs_compile.embed.run import Embedding, embed

__all__ = ["EmbedError", "Embedding", "embed"]
