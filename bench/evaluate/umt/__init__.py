"""UMT's own evaluations: text-video retrieval with re-ranking, and video question answering."""
