"""Loads, measures, exports and shows the result of a run."""
