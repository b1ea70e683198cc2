"""Many runs that belong together: planned from one file, run in order, resumed, compared."""
