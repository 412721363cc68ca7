# %% [markdown]
# # Blackwell GPUs: a kernel that was never run by us
#
# gna_flex has a kernel for NVIDIA's data-center Blackwell GPUs, those of compute capability 10: B200, B300. We have had
# no such GPU. So we say plainly what has been checked, and how; a self-test decides on your machine whether calls may
# take the kernel; and you can send us what it says. This tutorial needs no GPU.
#
# ## Which route a call takes
#
# The route is called `blackwell`. It is preferred on GPUs of capability 10, for the calls that `hopper` takes on others
# (float16 or bfloat16, no `score_mod`, no `and_mask`), with head dims up to 128. It also takes float8_e4m3fn, never run
# by us either, with head dims 64 and 128, without gradients and in no compiled graph. Until the self-test has passed,
# calls take compiled FlexAttention (in float8_e4m3fn the reference). GPUs of capability 12 (GeForce, RTX PRO) lack the
# instructions, and keep FlexAttention.

# %%
import json
from pathlib import Path

import torch
from rich import print

from gna_flex.cli import main
from gna_flex.routing import choose_route, facts_on

call = facts_on(torch.device("cpu"), torch.bfloat16, head_dim=128, pairs=1 << 34)
b200 = call._replace(device="cuda", capability=(10, 0), missing="")
print(choose_route(b200))
print(choose_route(b200._replace(untested="its self-test failed on this machine: 1 of 62 problems failed")))
assert choose_route(b200).name == "blackwell"
assert choose_route(b200._replace(capability=(12, 0))).name == "flex-tiles"

# %% [markdown]
# The backward is FlexAttention's, from the kernel's output and log-sum-exp.
#
# ## What has been checked without the hardware
#
# Every line names tests that you can run from a checkout, on a CPU (`python -m pytest FILE`); CI runs them all.
#
# - It compiles for `sm_100a`, `sm_103a` and `sm_100f`, with 128 registers, no spills, and the instructions that it
#   should have. A softmax step takes about 430 of 1024 issue slots without a mask, about 590 with one:
#   `tests/test_blackwell_budget.py`
# - Descriptors of its multiplications are, bit for bit, those that CUTLASS computes:
#   `tests/test_blackwell_descriptors.py`
# - Its work lists meet every pair of query and key exactly once, by brute force, and no tile shapes are better than the
#   chosen ones: `tests/test_tables.py`, `tests/test_shapes.py`
# - A model of its barriers has no deadlock and reads no buffer too early, in every order of events, and changes of the
#   protocol are caught: `tests/test_blackwell_protocol.py`
# - The host tells it the right boxes and architecture: `tests/test_plan.py`
# - A PTX interpreter runs the kernel on a CPU, with hostile timing: 33 problems with every feature equal float64, and
#   every reading too early, missing fence or race is an error: `tests/test_ptx_kernel.py`. Kernels with one thing
#   changed (a bit of a descriptor, a barrier, a fence, a column) must be caught: `tests/test_ptx_blackwell_mutants.py`.
#   The same in float8_e4m3fn, with 8 problems: `tests/test_ptx_float8.py`
# - The same interpreter gives the outputs that an H100 gave for the Hopper kernel, but for roundings, and the right
#   results for Blackwell kernels of others that are known to work, of CUTLASS and of Triton:
#   `tests/test_ptx_recorded.py`, `tests/test_ptx_third_party.py`
# - Problems of the self-test below, with tiles and budgets as on a B200, pass in the interpreter:
#   `tests/test_ptx_selftest.py`
# - The self-test survives processes that crash, hang, lie, or run at the same time: `tests/test_selftest.py`,
#   `tests/test_verdict.py`
#
# What nobody knows before it runs: its speed, and whether the hardware does something that its manual leaves open.
#
# With a compiler (`pip install 'gna-flex[cuda]'`) you can look at the kernel for a B200, without a GPU:

# %%
from gna_flex.cuda import jit
from gna_flex.cuda.blackwell import BlackwellConfig

(config,) = BlackwellConfig.defaults(head_dim=128, capability=(10, 0))
try:
    cubin = config.compile(config.arch((10, 0)))
    print(jit.resource_usage(cubin.log), f"{len(cubin.code):,} bytes, {cubin.arch}")
    assert jit.spills(cubin.log) == 0
except ImportError as error:
    print(error)

# %% [markdown]
# ## The self-test
#
# The first call on such a GPU that could take the kernel runs it, in a process of its own: problems with every feature
# of the kernel against float64. Errors must be rounding, of log-sum-exps at most 1e-4; outputs are NaN before, so that
# what is not written shows; and repeated calls must give the same bits. First comes a kernel that gives up when a wait
# takes too long, then the one that calls will take. A process that says nothing for two minutes, or takes more than
# five, is ended. A warning says that this is going on; compiled functions run it while they are compiled.
#
# The verdict is kept beside the compiled kernels, for this GPU model, driver, torch, compiler and version of gna_flex.
# Of many processes (ranks of a training, say) one tests and the others wait. If the test cannot run, for lack of memory
# for example, calls take FlexAttention in this process, and the next process tries again.
#
# By hand, and with more to see, on all routes that a machine has:
#
# ```sh
# gna-flex selftest
# gna-flex selftest --route blackwell --report blackwell.json
# gna-flex info
# ```
#
# It exits with 1 if something is wrong, and `gna-flex info` shows the verdict. The tests that the Hopper kernel passes,
# with 3,000 random problems, run on your GPU as well, from a checkout:
# `GNA_FLEX_SELFTEST=trust python -m pytest tests/gpu/test_hopper.py`. On a CPU the self-test tests the other routes:

# %%
status = main(["selftest", "--route", "reference", "--device", "cpu", "--report", "report.json"])
(route,) = json.loads(Path("report.json").read_text())["routes"]
print(route["versions"], route["results"][0])
assert status == 0
assert route["status"] == "passed"

# %% [markdown]
# ## Please send us the report
#
# It is one JSON file: versions, GPU model, driver, each problem with its error and its budget, and times beside torch's
# dense attention. Names of users, machines and folders are taken out. Attach it to an issue, whether the test passed or
# not: a pass is news to us, too.
#
# ## Forcing the route, or switching it off
#
# | in the environment | effect |
# |---|---|
# | `GNA_FLEX_BACKEND=blackwell` | calls take the kernel, or raise an error that says why they cannot |
# | `GNA_FLEX_BACKEND=flex-tiles` | calls take FlexAttention, and nothing is tested |
# | `GNA_FLEX_SELFTEST=off` | nothing is tested; the kernel is taken only if it passed before |
# | `GNA_FLEX_SELFTEST=again` | tested anew, once in each process |
# | `GNA_FLEX_SELFTEST=trust` | taken untested |
#
# In Python, `with gna_flex.backend("flex-tiles"):` does the same for some calls, and `explain(q, k, v, mask)` says what
# a call does.
