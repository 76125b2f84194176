"""Rings of matrix products over gloo, next to products of whole tensors, even and uneven. For ranks.py."""

import torch
import torch.distributed as dist

from shardc.runtime import DistributedMesh, Part, local_mesh, ring_lhs, ring_rhs, ring_sum

mesh = local_mesh({"a": 2, "b": 2})
assert isinstance(mesh, DistributedMesh)
torch.manual_seed(0)


def own(x: torch.Tensor, part: Part, dim: int) -> torch.Tensor:
    """The rank's part of a tensor, padded."""
    mine = x.narrow(dim, min(part.start, part.size), part.valid)
    return torch.nn.functional.pad(mine, [0, 0] * (x.dim() - 1 - dim) + [0, part.length - part.valid])


def same(axis: str, length: int, *batch: int) -> None:
    """What every ring makes, without padding."""
    a = torch.randn(*batch, length, 2 * length, dtype=torch.float64)
    b = torch.randn(*batch, 2 * length, length + 1, dtype=torch.float64)
    whole, rows, inner, columns = a @ b, len(batch), len(batch) + 1, len(batch) + 1

    def work() -> None:
        m, k, n = (Part((axis,), size) for size in (length, 2 * length, length + 1))
        turned = own(a, m, rows).mT.contiguous().mT  # as the operand of a weight's gradient lies
        found = [
            (ring_lhs(turned, b, m=m), whole),
            (ring_lhs(own(a, k, inner), b, k=k), whole),
            (ring_rhs(a, own(b, n, columns), n=n), whole),
            (ring_rhs(a, own(b, k, rows), k=k), whole),
            (ring_sum(own(a, k, inner), own(b, k, rows), m=m), own(whole, m, rows)),
            (ring_sum(own(a, k, inner), own(b, k, rows), n=n), own(whole, n, columns)),
        ]
        for one, other in found:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    mesh.run(work, lambda _: ())


same("a", 8)
same("b", 7, 3)
same("a", 9)
print(f"rank {mesh.rank} is right", flush=True)
dist.destroy_process_group()
