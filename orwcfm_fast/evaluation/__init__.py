"""What is measured on samples."""
