"""Ring attention over gloo, next to attention of one device, over one axis and over two. For ranks.py."""

import torch
import torch.distributed as dist

from shardc.runtime import DistributedMesh, Part, local_mesh, ring_attention, ring_attention_backward

mesh = local_mesh({"a": 2, "b": 2})
assert isinstance(mesh, DistributedMesh)
torch.manual_seed(0)
attention, backward = torch.ops.shardc.attention, torch.ops.shardc.attention_backward


def own(x: torch.Tensor, part: Part, dim: int) -> torch.Tensor:
    """The rank's part of a tensor, padded."""
    mine = x.narrow(dim, min(part.start, part.size), part.valid)
    return torch.nn.functional.pad(mine, [0, 0] * (x.dim() - 1 - dim) + [0, part.length - part.valid])


def check(heads: tuple[int, ...], length: int, axes: tuple[str, ...], causal: bool, window: int) -> None:
    """The rank's part of the result and of all gradients."""
    q = torch.randn(2, *heads, length, 4, dtype=torch.float64)
    k, v = torch.randn(2, heads[0], length, 4, dtype=q.dtype), torch.randn(2, heads[0], length, 6, dtype=q.dtype)
    literals = None, None, None, causal, 0.5, window, 0.0, 0.0
    out, total = attention(q, k, v, *literals)
    grad, row = torch.randn_like(out), q.dim() - 2
    expected = [out, total, *backward(grad, q, k, v, *literals[:3], out, total, *literals[3:])[:3]]

    def work() -> list[torch.Tensor]:
        part = Part(axes, length)
        mine = [own(x, part, x.dim() - 2) for x in (q, k, v)]
        made = ring_attention(*mine, *literals, r=part, s=part)
        upper = own(grad, part, row)
        grads = ring_attention_backward(upper, *mine, *literals[:3], *made, *literals[3:], r=part, s=part)
        return [x.narrow(x.dim() - 2 + (x is made[1]), 0, part.valid) for x in (*made, *grads[:3])]

    part_of = mesh.run(lambda: (Part(axes, length).start, Part(axes, length).valid), lambda _: ())[0]
    for found, whole in zip(mesh.run(work, lambda _: ())[0], expected, strict=True):
        dim = whole.dim() - (1 if whole is total else 2)
        torch.testing.assert_close(found, whole.narrow(dim, *part_of), rtol=1e-10, atol=1e-10)


check((2, 2), 8, ("a", "b"), True, 0)
check((2,), 7, ("a",), False, 0)
check((1, 4), 8, ("b",), True, 3)
check((4,), 12, ("b", "a"), False, 4)
print(f"rank {mesh.rank} is right", flush=True)
dist.destroy_process_group()
