"""The parts of `twinformers.diverge`: two models that can be run piece by piece, and what may explain a gap.

`sides` records a model's submodules and calls one alone, `values` names and pairs what they are given,
`rewriting` changes single operations while a module runs, `hypotheses` tries mistakes that people make, and
`gradients` does for the backward pass what `parity.diverge` does for the forward pass.
"""
