"""From a dataset to batches that are a function of (seed, epoch, sample)."""
