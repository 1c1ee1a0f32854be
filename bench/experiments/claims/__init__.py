"""The experiments: a file for each claim."""
