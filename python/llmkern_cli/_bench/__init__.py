"""What `llmkern bench` and `python -m bench.linear` share: the machine's limits, candidates, clock, rows, goals, plot.

It is part of the installed package, so that anyone can repeat a measurement without a checkout.
"""
