"""Importing this module finds out what vectors the processor has, so that processes forked afterwards know it.

Inductor asks an interpreter of its own that imports torch: more than a second of CPU in each rank that it compiles for.
No more is done here: a backward pass would start threads, after which autograd refuses to run in forks.
"""

from __future__ import annotations

from torch._inductor.cpu_vec_isa import valid_vec_isa_list

valid_vec_isa_list()
