"""Selections, one file each. A file's class says what it needs and how it scores; its arguments are the policy's.

To add one: a subclass of `Selection`, registered under its name, and a test file. Nothing else is edited.
"""
