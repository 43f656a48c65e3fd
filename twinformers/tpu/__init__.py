"""TPUs without a TPU: the real compiler says whether a model fits a slice, and what a step would take.

`plan` answers for one mesh, `search` for several; `twinformers tpu` is the same on the command line.
"""
