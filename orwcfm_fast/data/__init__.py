"""Datasets. A file in this folder that decorates a loader with `@dataset(…)` adds one; nothing else is edited."""
