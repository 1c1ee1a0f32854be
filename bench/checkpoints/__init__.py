"""Checkpoints of any size, generated, and what `pissa init`, `pissa.load` and their peers need to process them."""
