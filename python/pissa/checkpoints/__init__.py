"""Whole checkpoints on disk, matrix by matrix: none of them is ever in memory.

- `source` a model's folder, mapped
- `planned_file`, `journal`, `output`: a folder that several processes write, and that a killed run goes on with
- `report` what a model's folder holds for PiSSA: `spectrum`, `nuclear`, `quant_errors`, `budget`, `training_memory`
"""
