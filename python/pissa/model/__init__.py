"""Adapted layers put into a model, and taken out again."""
