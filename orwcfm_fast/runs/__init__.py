"""Whole runs, each in its directory; what the commands call."""
