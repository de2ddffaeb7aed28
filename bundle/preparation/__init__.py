"""From NIfTI to the store: sources of runs, checks, the grid, time, z-scores, and what is kept."""
