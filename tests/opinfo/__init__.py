"""PyTorch's operator database against shardc: every operator, with operands that enter the mesh in every layout.

database.py    the entries of torch's database and the sample calls that are tried
hand_made.py   sample calls for operators whose own samples are too small to split
adapter.py     one call with its operands in given layouts, forward and backward, and the trace of what ran
judge.py       right or wrong, split or not: what is recorded of one operator
summary.py     totals over all operators, and the page that tells them
workers.py     processes that do it side by side
__main__.py    runs everything: `make opinfo`
recorded.json  what the test in test_opinfo.py holds its operators to
"""
