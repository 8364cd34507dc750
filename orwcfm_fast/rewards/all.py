"""Importing this registers every reward that ships."""

from orwcfm_fast.rewards import clip, digits, images, process, vectors

__all__ = ["clip", "digits", "images", "process", "vectors"]
