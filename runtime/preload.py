"""What the fork server imports before it forks device processes. Import it nowhere else.

The order matters: first the signals (Ctrl-C reaches the whole foreground group during the import),
then numpy's OpenBLAS, which starts threads at import unless told not to, then the link to the
supervisor, then the imports. Nothing here may run a torch operation (a child forked after a
parallel region hangs in its first one), ask for CUDA, or make a ZeroMQ context (threads).

multiprocessing swallows an ImportError of a preloaded module; the device process says in its Hello
whether this one was imported to its end, and how many threads there were.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

from cortex.runtime import lifeline

lifeline.ignore_stop_signals()

from cortex.runtime import fork_server  # noqa: E402 - the signals come first

os.environ["OPENBLAS_NUM_THREADS"] = "1"
# torch.cuda.is_available() would otherwise call cuInit, after which no fork may use CUDA.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
# By default CUDA numbers the fastest GPU first; NVML, and so the configuration, goes by PCI bus.
os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
lifeline.die_with_parent(int(os.environ[fork_server.SUPERVISOR_PID]))
fork_server.set_title("neuron fork server")
gc.disable()  # nothing that these imports make goes again: looking took 0.2 of their 1.7 s
fork_server.import_device_main()
gc.freeze()  # nor will it, in any child
gc.enable()

SERVER_PID = os.getpid()
SERVER_THREADS = sum(1 for _ in Path("/proc/self/task").iterdir())
