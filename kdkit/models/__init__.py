"""Builds a network by name: adapted to the batches, initialised and observed."""
