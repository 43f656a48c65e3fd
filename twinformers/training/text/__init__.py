"""Training a causal decoder on text or token files, in either framework, from one start on the same data.

Data, initial weights, schedule, evaluation and the loop are shared. What a framework does itself (an update,
its checkpoints) stands in `jax_side` and `torch_side`, which are imported when they are needed.
"""
