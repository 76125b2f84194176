"""What generated code needs to run: meshes, collectives, slicing, random numbers, attention, the executable.

Imports torch and nothing else of shardc, so that a saved module runs without the compiler.
"""

if __name__ != "shardc.runtime":
    raise ImportError("import shardc.runtime")

from shardc.runtime.collectives.basic import (
    all_gather,
    all_reduce,
    all_to_all,
    permute,
    reduce_scatter,
    shard,
    to_partial,
)
from shardc.runtime.collectives.buckets import all_reduce_bucket, reduce_scatter_bucket
from shardc.runtime.collectives.started import Started, wait
from shardc.runtime.errors import RankError
from shardc.runtime.execute.executable import Executable, load
from shardc.runtime.execute.slots import Cuts, Slot, cut, cuts_of, paste, placements
from shardc.runtime.kernels.attention import attention, attention_backward
from shardc.runtime.kernels.attention_parts import attention_in_parts, attention_in_parts_backward
from shardc.runtime.kernels.checks import checked
from shardc.runtime.kernels.columns import cholesky_inverse, householder_product
from shardc.runtime.kernels.exponentials import (
    log_softmax,
    log_softmax_backward,
    log_softmax_gathered,
    logsumexp,
    logsumexp_gathered,
    safe_softmax,
    safe_softmax_gathered,
    softmax,
    softmax_backward,
    softmax_gathered,
)
from shardc.runtime.kernels.extremes import argmax, argmin, max_along, min_along, topk
from shardc.runtime.kernels.indexing import drop_dummy, fill, pad_dummy, rebase
from shardc.runtime.kernels.lists import hash_tensor, nonzero_static, pair_distances
from shardc.runtime.kernels.moves import (
    arange,
    cat_along,
    constant_pad,
    diagonal,
    diagonal_backward,
    eye,
    linspace,
    select_along,
    select_backward,
    slice_along,
    slice_backward,
    split_along,
    stack_along,
    tril,
    triu,
    unbind_along,
)
from shardc.runtime.kernels.norms import layer_norm, layer_norm_backward, rms_norm
from shardc.runtime.kernels.parts import Part
from shardc.runtime.kernels.random import (
    binomial,
    draw,
    multinomial,
    poisson,
    randperm,
    rrelu,
    sample_dirichlet,
    standard_gamma,
)
from shardc.runtime.kernels.scans import cummax, cummin, cumprod, cumsum, logcumsumexp
from shardc.runtime.kernels.shifts import flip, roll
from shardc.runtime.kernels.windows import (
    avg_pool2d,
    avg_pool2d_backward,
    avg_pool3d,
    avg_pool3d_backward,
    convolution,
    convolution_backward,
    max_pool2d,
    max_pool2d_backward,
    max_pool3d,
    max_pool3d_backward,
)
from shardc.runtime.mesh.distributed import DistributedMesh, distribute, local_mesh, swap_in
from shardc.runtime.mesh.mesh import Context, RuntimeMesh, current
from shardc.runtime.mesh.virtual import VirtualMesh

__all__ = [
    "Context",
    "Cuts",
    "DistributedMesh",
    "Executable",
    "Part",
    "RankError",
    "RuntimeMesh",
    "Slot",
    "Started",
    "VirtualMesh",
    "all_gather",
    "all_reduce",
    "all_reduce_bucket",
    "all_to_all",
    "arange",
    "argmax",
    "argmin",
    "attention",
    "attention_backward",
    "attention_in_parts",
    "attention_in_parts_backward",
    "avg_pool2d",
    "avg_pool2d_backward",
    "avg_pool3d",
    "avg_pool3d_backward",
    "binomial",
    "cat_along",
    "checked",
    "cholesky_inverse",
    "constant_pad",
    "convolution",
    "convolution_backward",
    "cummax",
    "cummin",
    "cumprod",
    "cumsum",
    "current",
    "cut",
    "cuts_of",
    "diagonal",
    "diagonal_backward",
    "distribute",
    "draw",
    "drop_dummy",
    "eye",
    "fill",
    "flip",
    "hash_tensor",
    "householder_product",
    "layer_norm",
    "layer_norm_backward",
    "linspace",
    "load",
    "local_mesh",
    "log_softmax",
    "log_softmax_backward",
    "log_softmax_gathered",
    "logcumsumexp",
    "logsumexp",
    "logsumexp_gathered",
    "max_along",
    "max_pool2d",
    "max_pool2d_backward",
    "max_pool3d",
    "max_pool3d_backward",
    "min_along",
    "multinomial",
    "nonzero_static",
    "pad_dummy",
    "pair_distances",
    "paste",
    "permute",
    "placements",
    "poisson",
    "randperm",
    "rebase",
    "reduce_scatter",
    "reduce_scatter_bucket",
    "rms_norm",
    "roll",
    "rrelu",
    "safe_softmax",
    "safe_softmax_gathered",
    "sample_dirichlet",
    "select_along",
    "select_backward",
    "shard",
    "slice_along",
    "slice_backward",
    "softmax",
    "softmax_backward",
    "softmax_gathered",
    "split_along",
    "stack_along",
    "standard_gamma",
    "swap_in",
    "to_partial",
    "topk",
    "tril",
    "triu",
    "unbind_along",
    "wait",
]
