"""One self-contained page from a run folder. Free of torch: it reads JSON, PNG and TOML, and never a weight."""
