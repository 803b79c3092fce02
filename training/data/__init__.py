"""Data sets of the field, read from their real layouts on disk."""
