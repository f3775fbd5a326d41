"""Mixture of experts on a GPU: moe_route, moe_sort, moe_linear, moe_combine, each with schema, reference and fake rule."""

from types import SimpleNamespace

from . import reference as _r

route = SimpleNamespace(SCHEMA=_r.ROUTE_SCHEMA, reference=_r.moe_route_reference, fake=_r.moe_route_fake)
sort = SimpleNamespace(SCHEMA=_r.SORT_SCHEMA, reference=_r.moe_sort_reference, fake=_r.moe_sort_fake)
linear = SimpleNamespace(SCHEMA=_r.LINEAR_SCHEMA, reference=_r.moe_linear_reference, fake=_r.moe_linear_fake)
combine = SimpleNamespace(SCHEMA=_r.COMBINE_SCHEMA, reference=_r.moe_combine_reference, fake=_r.moe_combine_fake)
tile_rows = _r.tile_rows

__all__ = ["combine", "linear", "route", "sort", "tile_rows"]
