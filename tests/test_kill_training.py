"""A few kills at random moments; `python tests/kill_training.py 50` makes more."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from kill_training import storm
print(storm(Path(sys.argv[1]), 6, max_steps=600, seed=3).kills)
"""


def test_killed_six_times_a_run_ends_as_one_that_was_not(tmp_path):
    """In a process of its own: it forks, which the threads of other tests would not survive."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "6\n"
