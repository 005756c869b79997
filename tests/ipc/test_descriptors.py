"""How many files a daemon may have open."""

import resource
import subprocess
import sys

ASK = """
import resource
from cortex.ipc.descriptors import allow_many_descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))
allow_many_descriptors()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_a_daemon_may_open_as_many_files_as_the_system_lets_it() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    ended = subprocess.run(
        [sys.executable, "-c", ASK.format(hard=hard)], capture_output=True, text=True, check=True
    )

    assert int(ended.stdout) == hard
