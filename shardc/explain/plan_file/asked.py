"""What a plan was made for, as plain values: options and hardware."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from shardc.cost.hardware import Hardware, Link
from shardc.ir.constrain import serialise
from shardc.options import Options

_PLAIN = (str, int, float, bool, dict, type(None))


def options_json(options: Options) -> dict[str, Any]:
    """The options that a plan depends on, those at their defaults too."""
    plain: dict[str, Any] = {
        one.name: getattr(options, one.name) for one in fields(Options) if one.name not in ("plan", "cache")
    }
    plain["constraints"] = {pattern: serialise(spec) for pattern, spec in options.constraints.items()}
    plain["dynamic"] = {
        argument: {str(dim): name for dim, name in dims.items()} for argument, dims in options.dynamic.items()
    }
    plain["hardware"] = options.hardware.name if isinstance(options.hardware, Hardware) else options.hardware
    return {name: value if type(value) in _PLAIN else str(value) for name, value in plain.items()}


def hardware_json(device: Hardware) -> dict[str, Any]:
    """The figures of a device and its links; without a bound on memory that is null."""
    return {
        "name": device.name,
        "memory": device.memory if math.isfinite(device.memory) else None,
        "memory_bandwidth": device.memory_bandwidth,
        "draws": device.draws if math.isfinite(device.draws) else None,
        "stream": device.stream if math.isfinite(device.stream) else None,
        "launch": device.launch,
        "start": device.start,
        "devices_per_node": device.devices_per_node,
        "flops": dict(device.flops),
        "inside": _link(device.inside),
        "between": _link(device.between),
        "algorithms": {collective.name: list(names) for collective, names in device.algorithms.items()},
    }


def _link(link: Link) -> dict[str, Any]:
    plain: dict[str, Any] = {"latency": link.latency, "bandwidth": link.bandwidth}
    plain |= {"overlap": link.overlap, "stall": link.stall, "profile": [list(pair) for pair in link.profile]}
    for name in ("measured", "spanning"):
        links: Mapping[Any, Link] = getattr(link, name)
        plain |= {name: {collective.name: _link(one) for collective, one in links.items()}} if links else {}
    return plain
