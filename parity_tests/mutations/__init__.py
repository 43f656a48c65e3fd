"""Known mistakes, planted one at a time: each must make the ordinary suite fail and be found by `diverge`.

A suite that cannot fail proves nothing. `models`, `others` and `around` hold the mistakes, `planting` plants
them, `running` lets pytest and `diverge` loose on them. `python -m mutations` does that for all or some of
them, in one process.
"""
