"""What Python runs at its start in the processes of `pissa run`, whose PYTHONPATH begins with this folder."""
