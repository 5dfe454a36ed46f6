"""The only room that knows a run's folder: its stages and their keys, what they share, and a network by replay."""
