"""The settings of a run: schema, rules between keys, loading from YAML and the command line. Never imports torch."""
