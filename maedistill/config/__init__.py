"""The settings of a run: schema, rules between them, loading from YAML and the command line. Never imports torch."""
