"""What `pissa run` puts before other modules, in the processes whose PYTHONPATH begins with this folder."""
