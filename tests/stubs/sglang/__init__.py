"""A stub of the interface that the plug-in uses."""
