"""Speed and memory beside other libraries: `python -m bench.compare`; `python -m bench.compare.svd_quality`."""
