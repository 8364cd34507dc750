"""The methods: rows of one objective, a family a file. A file that decorates a function with `@method(…)` adds one."""

from orwcfm_fast.method.objectives.objective import METHODS, Method, Point, check_bounded, method, signal_of

__all__ = ["METHODS", "Method", "Point", "check_bounded", "method", "signal_of"]
