"""The machinery of flatcensus: manifest, plan, units, shards, tables, report. Knows no formula."""
