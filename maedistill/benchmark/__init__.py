"""Where the time goes on this machine: measured side by side, counted where counting is possible."""
