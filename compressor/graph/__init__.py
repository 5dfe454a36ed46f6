"""A model in, its ATen graph out, and what can be asked of such a graph. The only reading of a model's code."""

from .tracing import Watcher, aten, fetch, place_of, store, trace

__all__ = ["Watcher", "aten", "fetch", "place_of", "store", "trace"]
