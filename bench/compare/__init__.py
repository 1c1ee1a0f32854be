"""Speed and memory compared with other libraries: `python -m bench.compare`; `python -m bench.compare.svd_quality`."""
