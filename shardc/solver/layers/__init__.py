"""Networks of many equal layers: folded to a few, proved as a ring."""
