"""Studies: many related runs, planned from one file, run in order, resumed and compared."""
