"""Run configs: a file each, with `get_config()`."""
