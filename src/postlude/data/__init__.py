"""The data path: sources, filters, formats, rendering and masks, packing, the exact loader, statistics, preview."""
