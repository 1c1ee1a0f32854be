"""The experiments, with a file for each claim."""
