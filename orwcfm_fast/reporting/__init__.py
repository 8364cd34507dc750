"""Tables, pictures, charts, the page, the logs."""
