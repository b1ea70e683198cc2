"""What the tests share: starting processes, tiny data sets, checkpoints and hostile files."""
