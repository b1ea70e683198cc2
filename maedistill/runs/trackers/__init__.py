"""Programs that show a run while it goes on."""
