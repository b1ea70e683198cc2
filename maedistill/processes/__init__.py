"""The processes of a run: who is who, who is alive, signals, and the end of the launcher."""
