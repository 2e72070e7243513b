"""Plug-ins for inference servers: not imported by `import llmkern`, and they import no server until they are called.

Untested against the real servers: the tests run them against stubs of the documented interfaces.
"""
