"""What a fork server imports in tests: all that ``cortex.runtime.preload`` does, but for torch."""

import os
from pathlib import Path

from cortex.ipc import channel, ring  # noqa: F401 - so that children start fast
from cortex.runtime import fork_server, lifeline

lifeline.ignore_stop_signals()
lifeline.die_with_parent(int(os.environ[fork_server.SUPERVISOR_PID]))
fork_server.set_title("neuron fork server")

SERVER_PID = os.getpid()
SERVER_THREADS = sum(1 for _ in Path("/proc/self/task").iterdir())
