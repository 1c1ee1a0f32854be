"""Generates checkpoints of any size; measures what `pissa init`, `pissa.load` and their peers need to process them."""
