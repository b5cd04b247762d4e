"""Turns a dataset into batches that are a function of (seed, epoch, sample)."""
