"""Models in transformers with gates or per-head masks."""
