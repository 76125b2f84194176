"""Exact minimisation of a cost network: problem in, choice and proved bound out. Nothing here knows what it is for.

*The idea.* Messages between variables move cost around until the minima of all terms nearly add up to the cost of a
choice; then few values can be in a better choice, and these are searched exactly. What repeats is solved once. The
messages are the proof: anybody can add up the minima again.

*Reading order.* `problem.py` (what is asked), `solve.py` (all steps, in order), `bounds/bound.py` (the messages),
`exact/search.py` (one network), `proof/certificate.py` (the proof), `layers/fold.py` (what repeats). Then
`loads.py` and `capacity.py`: the same under a limit on a weighted sum. Constants: `tuning.py`.

*Words.* A *variable* takes one *value*; a *choice* has a value per variable. A *layer* is a block of variables that
repeats. The *gap* is what a choice costs beyond the bound.
"""
