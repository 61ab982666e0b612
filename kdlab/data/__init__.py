"""Data sets on disk to samples, samples to batches."""
