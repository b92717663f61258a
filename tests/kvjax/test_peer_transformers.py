"""The peer's script says what it lacks; with torch it is run by `kvjax.bench decode --against=transformers`."""

import json
import subprocess
import sys

from kvjax import peer_transformers


def test_a_python_without_torch_is_told_apart():
    blocked = "import sys; sys.modules['torch'] = None; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", blocked, peer_transformers.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert json.loads(done.stdout) == {"missing": "torch"}
