"""See api.py."""

from pallas_kernels.page_copies.api import KVBlock, copy_pages, gather_pages, scatter_pages

__all__ = ["KVBlock", "copy_pages", "gather_pages", "scatter_pages"]
