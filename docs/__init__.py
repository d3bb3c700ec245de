"""Pages, and in `tools/` the programs that make their plots and tables."""
