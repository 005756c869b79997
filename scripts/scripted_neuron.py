"""A neuron whose model is a script: the same program and processes, ``scripted_model.py`` inside.

It takes every option of ``neuron``; give it a model whose tokeniser it may borrow.
"""

from __future__ import annotations

import functools

import scripted_model

from cortex.runtime import supervisor
from cortex.runtime.__main__ import main
from cortex.runtime.fork_server import ForkServer

if __name__ == "__main__":
    scripted = functools.partial(ForkServer, scripted_model.run)
    setattr(supervisor, "ForkServer", scripted)  # noqa: B010 - the one double here
    main()
