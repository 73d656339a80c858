"""A small Vision Transformer library, and the machinery of the course that stands on it.

Read ``vitlib.model`` first. Importing ``vitlib`` loads nothing; import what you need from its modules.
"""
