"""Networks of many equal layers, that is, repeated blocks of variables: folded to a few, proved as a ring."""
