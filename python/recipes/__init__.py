"""Whole runs of the method; not installed."""
