"""Several models of one base become one: `launch/merge.py`, docs/merging.md.

A method is one function a file, `method(piece, **settings) -> tensor`, found by name (methods.py).
`merge.py` streams every tensor through it, so memory holds a few tensors and never a model.
"""
