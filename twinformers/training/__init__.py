"""Training for real: English number names to German, in either framework, from the same start.

The data, the schedule, the initial weights and the loop are shared. What a framework does itself, one update
from one batch, stands in `jax_trainer` and `torch_trainer`, which are imported when they are needed.
"""
