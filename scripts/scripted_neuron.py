"""A neuron whose model is a script: the same program and processes, ``scripted_model.py`` inside.

It takes every option of ``neuron``; give it a model whose tokeniser it may borrow. What a script
holds is not kept: true neurons with the same cache would take it for what that model needs.
"""

from __future__ import annotations

import functools

import scripted_model

from cortex.runtime import serving, supervisor
from cortex.runtime.__main__ import main
from cortex.runtime.footprints import Footprints
from cortex.runtime.fork_server import ForkServer

if __name__ == "__main__":
    scripted = functools.partial(ForkServer, scripted_model.run)
    setattr(supervisor, "ForkServer", scripted)  # noqa: B010 - a double
    setattr(serving, "Footprints", lambda _directory: Footprints(None))  # noqa: B010 - a double
    main()
