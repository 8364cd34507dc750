"""Tables, pictures, charts and report pages of runs, and loggers."""
