"""Experts of four processes: random routings, from even to a single expert, on one axis and on two. Values and
gradients are those of all experts in one place, and the bytes counted are what each routing says. For ranks.py."""

import torch
import torch.distributed as dist

from shardc.runtime import DistributedMesh, Part, local_mesh
from shardc.runtime.kernels.mixture.experts_parts import experts_exchanged, experts_exchanged_backward
from shardc.runtime.kernels.mixture.fused import experts, experts_backward

COUNT, TOKENS, K, D, F = 8, 6, 2, 4, 3
TOLD = ("mul(silu(gate), up)", "silu_backward(mul(grad, up), gate), mul(grad, silu(gate))")
ROUTINGS = 500

torch.set_num_threads(1)
meshes = [local_mesh({"ep": 4}), local_mesh({"node": 2, "gpu": 2})]
generator = torch.Generator().manual_seed(0)


def real(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


weights = real(COUNT, 2, F, D), real(COUNT, 2, F), real(COUNT, D, F), real(COUNT, D)


def routing(number):
    """Experts of all tokens, drawn from 1 to 8 popular ones."""
    popular = torch.randperm(COUNT, generator=generator)[: 1 + number % COUNT]
    return popular[torch.randint(0, len(popular), (4 * TOKENS, K), generator=generator)]


def expected(mesh, ids):
    """Bytes that this rank sends, by axis, forward and backward together: rows go over one axis after the other."""
    owner, source = ids.flatten() // (COUNT // 4), torch.arange(4).repeat_interleave(TOKENS * K)
    here, sent = mesh.rank, {}
    told = COUNT * 8
    for axis in reversed(mesh.axes):
        sent[axis], told = 2 * (mesh.axes[axis] - 1) * told, told * mesh.axes[axis]
    at = source.clone()
    stride = 4
    for axis in mesh.axes:
        stride //= mesh.axes[axis]
        place = at // stride % mesh.axes[axis], owner // stride % mesh.axes[axis]
        after = at + (place[1] - place[0]) * stride
        out, back = ((at == here) & (after != at)).sum(), ((after == here) & (after != at)).sum()
        sent[axis] += 8 * int(out * (3 * D + 1) + back * (2 * D + 1))
        at = after
    return sent


def checked(number, mesh):
    assert isinstance(mesh, DistributedMesh)
    x, grad, scores, ids = real(4 * TOKENS, D), real(4 * TOKENS, D), real(4 * TOKENS, K), routing(number)
    mine = slice(mesh.rank * TOKENS, (mesh.rank + 1) * TOKENS)

    def work():
        part = Part(tuple(mesh.axes), COUNT)
        own = [one[part.start : part.start + part.length] for one in weights]
        call = x[mine], ids[mine], scores[mine], *own, *TOLD
        made = experts_exchanged(*call, e=part, capacity=100.0)
        return [made, *experts_exchanged_backward(grad[mine], *call, True, e=part, capacity=100.0)], part.start

    mesh.reset()
    made, start = mesh.run(work, lambda _: ())[0]
    said = expected(mesh, ids)
    assert mesh.traffic == said, (number, mesh.traffic, said)
    if number % 10 < 2:
        every = x, ids, scores, *weights, *TOLD
        right = [experts(*every), *experts_backward(grad, *every, True)]
        cuts = [mine] * 3 + [slice(start, start + COUNT // 4)] * 4
        for one, other, cut in zip(made, right, cuts, strict=True):
            torch.testing.assert_close(one, other[cut], rtol=1e-10, atol=1e-10)


for number in range(ROUTINGS):
    checked(number, meshes[number % 2])
print(f"rank {dist.get_rank()} is right", flush=True)
