"""Measured latency: tables of layers timed on a runtime, what they predict, and the plan that meets a budget."""
