"""Whole runs in directories: what the commands call."""
