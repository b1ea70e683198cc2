"""Programs that show a run while it trains."""
