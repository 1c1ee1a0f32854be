"""Modules that `pissa run` puts in front of others, in the processes whose PYTHONPATH begins with this folder."""
