"""Programs that make plots and tables of the pages."""
