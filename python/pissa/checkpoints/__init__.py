"""Whole checkpoints on disk, matrix by matrix: none of them is ever in memory.

- `source` a model's folder, mapped
- `planned_file`, `journal`, `output`: a folder that several processes write, and that a killed run goes on with
- `composition`, `plan`: which tensors make the layers of an adapter
- `new_files`, `init`: residuals as a checkpoint, start factors as a LoRA beside it
"""
