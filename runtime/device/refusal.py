"""What a device process says no to, and by which code.

code                          says no to   because
model_not_loaded              any          the device does not hold the model
model_loading                 unload       the load is still running
already_loaded                load         the device holds the model
already_loading               load         a load of it is running or queued
insufficient_memory           load         the budget cannot hold it; it has the numbers
context_too_long              load         max_context_tokens is beyond what the model can
invalid_limits                load         a limit below one
unknown_dtype                 load         not one of those that LoadModel lists
bad_checkpoint                load         the files are not what they should be
load_failed                   load         anything else; a bug, whose traceback is in the log
duplicate_sequence            a prompt     the id is in use (names the command only)
empty_prompt                  a prompt
token_out_of_range            a prompt     it, or how to sample, names an id beyond the vocabulary
invalid_sampling              generate     a parameter out of range
context_length_exceeded       a prompt     no room in the context for it and an answer's first token
prompt_too_long_for_memory    a prompt     fits the context, can never fit the KV cache
unhealthy_logits              a sequence   its logits or its vector had a NaN or an infinity
cancelled                     embed        somebody asked for it, or the model or the device goes
grammar_failed                a sequence   its grammar is none, or no token can follow in it
out_of_memory                 a sequence   the youngest of a step that ran out of memory
step_failed                   a sequence   was in a step that failed otherwise
protocol_error                a frame      is not a command; nothing else is touched
group_failed                  a group      it could not be joined, or is not one that was joined
peer_lost                     a group      a rank did not come to meet the others in time
device_lost                   everything   fatal: the device's context cannot be used any more
peer_lost                     everything   fatal: a rank of the group is gone, or does not answer
ranks_diverged                everything   fatal: the ranks of a group chose different tokens
internal_error                everything   fatal: a bug in the device process's own loop
"""

from __future__ import annotations

from cortex.ipc.errors import CortexError
from cortex.ipc.messages import PEER_LOST


class Refused(CortexError):
    """A command that cannot be carried out; becomes ``Failed`` with this code, text and numbers."""

    def __init__(self, code: str, detail: str, **numbers: int) -> None:
        super().__init__(detail)
        self.code = code
        self.numbers = numbers


class DeviceLost(CortexError):
    """The device's context is broken: only a new process can use the device again."""

    code = "device_lost"


class PeerLost(DeviceLost):
    """What the ranks of a group do together cannot go on; another rank may be at fault."""

    code = PEER_LOST


class RanksDiverged(DeviceLost):
    """The tokens chosen here are not those of the first rank."""

    code = "ranks_diverged"
