"""Open networks and weights of any source: runs, exports, timm, hubs and files, with their license."""
