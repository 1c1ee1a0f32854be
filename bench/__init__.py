"""Benchmarks: `compare` on the CPU, `gpu` on a GPU, `cpp` for the core alone; `results` of these; `demo`; NOTES.md."""
