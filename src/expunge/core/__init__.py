"""The vocabulary of the library: nouns and protocols, no diffusers, no files."""
