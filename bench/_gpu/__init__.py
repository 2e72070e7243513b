"""The steps of `python -m bench.gpu`: each a process of its own, so that a lost CUDA context ends one step."""
