"""What is measured on the embedded models: one command each, results committed."""
