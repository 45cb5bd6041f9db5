"""Score maps over images, and which patches a schedule leaves: as tensors, as a picture, as a page."""

from rs_compile.visualize.layers import LayerMaps, ScoreMaps, SiteMap
from rs_compile.visualize.maps import score_maps
from rs_compile.visualize.page import save_page
from rs_compile.visualize.picture import save_picture

__all__ = ["LayerMaps", "ScoreMaps", "SiteMap", "save_page", "save_picture", "score_maps"]
