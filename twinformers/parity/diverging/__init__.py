"""The parts of `twinformers.diverge`.

`sides`, `jax_side` and `torch_side` record a model's submodules and call one alone; `opening` makes them of
what a user gives. `values` names and pairs what submodules are given. `case` holds the one that differs, and
`hypotheses` tries mistakes on it, in `parameters`, `operations`, `positions` and what remains; `rewriting`
changes single operations while a module runs. `gradients` takes the backward pass apart.
"""
