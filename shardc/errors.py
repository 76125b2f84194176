"""What a user can get wrong, each with its own type. Every message says what, where, and the way out."""

from shardc.runtime.errors import ShardcError as ShardcError  # its home: the runtime knows nothing of the compiler


class MeshError(ShardcError):
    """A mesh that cannot be read, or that does not fit the machines at hand."""


class LayoutError(ShardcError):
    """A layout that cannot exist: unknown axis, axis used twice, dim out of range, indivisible dim."""


class CaptureError(ShardcError):
    """The model cannot be traced: data-dependent control flow, unsupported construct."""


class RuleError(ShardcError):
    """An operator without a rule, or a rule that does not fit its operator."""


class ConstraintError(ShardcError):
    """Constraints that match nothing, or that contradict each other."""


class InfeasibleError(ConstraintError):
    """No plan satisfies the constraints; carries a minimal set that conflicts."""
