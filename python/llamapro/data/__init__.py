"""Text to token files, token files to batches."""
