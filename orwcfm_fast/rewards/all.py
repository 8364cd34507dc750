"""Importing this registers every reward that ships."""

from orwcfm_fast.rewards import aesthetic, classifier, clip, digits, images, process, vectors

__all__ = ["aesthetic", "classifier", "clip", "digits", "images", "process", "vectors"]
