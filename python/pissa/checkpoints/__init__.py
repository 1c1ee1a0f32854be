"""Whole checkpoints on disk, processed matrix by matrix, so that none is ever in memory. Errors are those of
`containers`.

Five files serve one idea: read a matrix, change it, write it, and go on after a kill. Read them in this order:

1. `rewrite`: the plan of a new checkpoint (what is copied, what is replaced, which layers change), and the run that
   carries it out, `Rewrite`.
2. `output`: the folder that several processes write, and that a run which was killed continues.
3. `init`: the simplest run. Layers are split; residuals replace weights, and start factors become a LoRA.
4. `trained`: an adapter seen from a checkpoint: for each layer the function on which it was trained, and the change.
5. `merge`: the run that writes weights with the change. Its first half finds what an adapter changes, which the exports
   use, too; `merge_codes` rounds the change into the codes of the base.

Beside them, `load` makes a PissaModel over the mapped files of a folder, and `training_memory` computes what a training
step takes.
"""
