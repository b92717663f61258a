"""Tasks, one file each; see `kvjax/task.py`."""
