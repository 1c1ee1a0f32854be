"""Puts adapted layers into a model and takes them out again."""
