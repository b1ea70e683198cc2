"""Anybody's networks and weights: where they come from, what they hold, under which licence."""
